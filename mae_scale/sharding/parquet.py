"""Images in parquet files, as Hugging Face's datasets have them.

Such images cannot be read by offset. So they are unpacked one after the other into a file beside
the shards, in bounded memory. That file is removed with the other temporary files of sharding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from mae_scale.data.remote import printable
from mae_scale.errors import UserError
from mae_scale.files import require_file
from mae_scale.sharding.imagenet import base_of
from mae_scale.sharding.labels import label_text, normal
from mae_scale.sharding.listing import Entry, Listing
from mae_scale.sharding.words import split_word

_BATCH = 64  # number of rows of a parquet file in memory at a time
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes",
           "picture", "photo", "image.bytes", "content", "data")  # fmt: skip
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target", "category", "class_name",
           "label_name", "class_label")  # fmt: skip


def find_parquet(src: Path, split: str) -> tuple[list[Path], bool]:
    """Find the parquet files of a split; return whether names of files or folders tell the split.

    The files lie in the folder, in ``data``, or in folders of the split, as on Hugging Face.

    Raises:
        UserError: there are such files, but none of this split.
    """
    files = [
        path
        for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet")
        for path in sorted(src.glob(pattern))
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(src).parts)
        and path.name != "metadata.parquet"
    ]
    words = {}
    for path in files:
        *folders, name = path.relative_to(src).parts
        stem = name.partition(".")[0].partition("-0")[0]
        found = [split_word(part)[0] for part in (stem, *reversed(folders))]
        words[path] = next((word for word in found if word), None)
    named = any(words.values())
    mine = [path for path in files if not named or words[path] == split]
    folders_of: dict[str, str] = {}  # without splits, numbers and label=3: configurations
    for path in mine:
        parts = path.relative_to(src).parts[:-1]
        kept = [p for p in parts if not (split_word(p)[0] or "=" in p or p.isdecimal())]
        folders_of["/".join(kept)] = str(path.parent)
    if len(folders_of) > 1:
        raise UserError(
            f"{src} has parquet files of several configurations; give the folder of one as SRC: "
            f"{' or '.join(sorted(folders_of.values())[:4])}"
        )
    if not named:
        return files, False
    if not mine:
        there = sorted({word for word in words.values() if word})
        raise UserError(f"{src} has no {split} split; it has: {', '.join(there)}")
    return mine, True


def read_parquet(files: Sequence[Path], spool: IO[bytes]) -> tuple[Listing, list[str] | None]:
    """Unpack the images of parquet files; return them, and the names of classes if there are any.

    Args:
        files: parquet files of one split.
        spool: file into which the images are written.

    Raises:
        UserError: a file is damaged, or has no images in it.
        OSError: the disk is full.
    """
    listing, classes = Listing(), None
    unlabelled: list[Entry] = []
    left_out: Counter[str] = Counter()
    with_names, labelled = 0, set()
    for file in files:
        entries, names = _from_parquet(file, spool, left_out, unlabelled)
        if names is not None:
            if classes is not None and classes != names:
                raise UserError(f"{file} lists other classes than {files[0]}")
            classes = names
        with_names += names is not None
        listing.images += entries
        labelled |= {any(entry.class_name != "images" for entry in entries)} if entries else set()
    if 0 < with_names < len(files) or len(labelled) > 1:
        raise UserError(
            f"some parquet files in {files[0].parent} have labels or names of classes and others "
            "have none; give a folder with files of one kind as SRC"
        )
    if unlabelled and not listing.images:
        listing.images, classes = unlabelled, ["images"]
        listing.notes.append("no row has a label: all images get the class 'images'")
    elif unlabelled:
        left_out["there is no label"] = len(unlabelled)
    if not listing.images:
        why = f" ({', '.join(left_out)})" if left_out else ""
        raise UserError(f"{files[0]} and {len(files) - 1} more hold no images{why}")
    if {e.class_name for e in listing.images} == {"images"} and not unlabelled:
        listing.notes.append(
            f"{files[0]} has no column of labels (looked for {', '.join(_LABELS[:4])}, …): all "
            "images get the class 'images'"
        )
    for reason, count in left_out.items():
        listing.notes.append(f"{count:,} rows of {files[0].parent} are left out: {reason}")
    return listing, classes


def _from_parquet(
    file: Path, spool: IO[bytes], left_out: Counter[str], unlabelled: list[Entry]
) -> tuple[list[Entry], list[str] | None]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{file}: parquet files need pyarrow: pip install 'mae-scale[parquet]'"
        ) from None
    try:
        require_file(file)
        table = parquet.ParquetFile(file)
        image, label = _columns(table.schema_arrow, file)
        names = _class_names(table.schema_arrow, label)
        folder = _partition(file)
        entries: list[Entry] = []
        number = 0
        for batch in table.iter_batches(_BATCH, columns=[image, label] if label else [image]):
            rows = dict(
                zip(batch.schema.names, (c.to_pylist() for c in batch.columns), strict=True)
            )
            for i, value in enumerate(rows[image]):
                where = f"row {number} of {file}"
                number += 1
                data, name = _bytes_of(value, where)
                if data is None:
                    left_out[f"there are no bytes in {image}"] += 1
                    continue
                class_name = _class_of(rows[label][i], names, where) if label else folder
                base = base_of(name or "") or f"{file.stem}_{number - 1:08d}.jpg"
                to, known = (unlabelled, "images") if class_name is None else (entries, class_name)
                to.append(Entry(known, f"{known}/{base}", len(data), spool.tell()))
                spool.write(data)
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{file} is not an intact parquet file: {printable(str(error))[:200]}"
        ) from None
    return entries, names


def _columns(schema: Any, file: Path) -> tuple[str, str | None]:
    """Return the columns of images and labels, found by metadata, name or type; None: no labels."""
    names = list(schema.names)
    lower = {name.lower(): name for name in reversed(names)}
    features = _features(schema)
    kind = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict) and n in names}
    images = [n for n in names if kind.get(n) == "Image"]
    if len(images) > 1:
        raise UserError(
            f"{file} has several columns of images ({', '.join(map(printable, images))}); keep the "
            "one to train on in a copy: Dataset.remove_columns([...]).to_parquet(...)"
        )
    images = images or [lower[n] for n in _IMAGES if n in lower]
    images = images or _binary(schema)
    if not images:
        raise UserError(f"{file} has no column image; it has: {', '.join(map(printable, names))}")
    labels = [lower[n] for n in _LABELS if n in lower and lower[n] != images[0]]
    features_of_class = [n for n in names if kind.get(n) == "ClassLabel"]
    if not labels and len(features_of_class) > 1:
        raise UserError(
            f"{file} has several columns of labels ({', '.join(map(printable, features_of_class))})"
            "; call the one to train on 'label' in a copy: "
            "Dataset.rename_column(..., 'label').to_parquet(...)"
        )
    labels += features_of_class
    return images[0], next(iter(labels), None)


def _binary(schema: Any) -> list[str]:
    """Return the column that holds bytes, if there is exactly one."""
    types = {field.name: field.type for field in schema}
    names = [n for n, t in types.items() if str(t) in ("binary", "large_binary", "binary_view")]
    return names if len(names) == 1 else []


def _features(schema: Any) -> dict[str, Any]:
    """Return the description of the columns that Hugging Face's datasets keep in the metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _partition(file: Path) -> str:
    """Return the label that a partition's folder names, such as ``label=3``; otherwise "images"."""
    pairs = [part.partition("=") for part in file.parts]
    return next((unquote(v) for k, _, v in reversed(pairs) if k in _LABELS and v), "images")


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Return the names of the classes in the metadata; None if there are none."""
    feature = _features(schema).get(label) if label else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return [normal(str(name)) for name in names] if isinstance(names, list) else None


def _bytes_of(value: Any, where: str) -> tuple[bytes | None, str | None]:
    """Return the bytes of an image and its name; None for what a row does not have.

    Raises:
        UserError: the row holds something else, such as a path or pixels.
    """
    name = None
    if isinstance(value, dict):
        value, name = value.get("bytes"), value.get("path")
        if value is None and name:
            raise UserError(f"{where} has only the path of an image ({printable(str(name))})")
    if isinstance(value, list) and value and all(type(v) is int and 0 <= v < 256 for v in value):
        value = bytes(value)
    if isinstance(value, (bytes, type(None))):
        return value or None, name
    raise UserError(f"{where} has no bytes of an image but a value of type {type(value).__name__}")


def _class_of(value: Any, names: list[str] | None, where: str) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, (list, dict)):
        raise UserError(f"{where} has several labels, or a label of type {type(value).__name__}")
    text = label_text(value)
    if text is None or names is None:
        return text
    if isinstance(value, str) and text in map(normal, names):
        return text
    if not text.isdecimal() or int(text) >= len(names):
        raise UserError(
            f"{where} has the label {value}, but the file's metadata list {len(names)} classes: "
            f"{', '.join(names[:10])}{', …' * (len(names) > 10)}"
        )
    return names[int(text)]
