"""Images that are packed or compressed: Hugging Face's parquet files and tar.gz.

They cannot be read by their place. So they are unpacked one after the other into a file beside the
shards, in bounded memory, and that file is removed with the other temporary files of sharding.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mae_scale.data.formats import is_image_name
from mae_scale.data.remote import printable
from mae_scale.errors import UserError
from mae_scale.files import owner
from mae_scale.sharding.imagenet import WNID, base_of
from mae_scale.sharding.labels import label_text, normal
from mae_scale.sharding.layouts import numbered, split_word
from mae_scale.sharding.listing import Entry, Source, sorted_source

_BATCH = 64  # rows of a parquet file in memory at a time


def find_packed(src: Path, split: str) -> list[Path]:
    """Find the parquet files or compressed tars of a split in a folder, or in its folder ``data``.

    Raises:
        UserError: there are such files, but none of this split.
    """
    for folder in (src, src / "data", src / "default"):
        if not folder.is_dir():
            continue
        for pattern in (r".*\.parquet", r".*\.(tar\.gz|tgz)"):
            files = [
                p
                for p in sorted(folder.iterdir())
                if re.fullmatch(pattern, p.name) and p.name[0] != "." and "devkit" not in p.name
            ]
            if not files:
                continue
            words = {p: split_word(p.name.partition(".")[0].partition("-0")[0])[0] for p in files}
            mine = [p for p in files if words[p] == split]
            if mine:
                return mine
            if any(words.values()):
                there = sorted({word for word in words.values() if word})
                raise UserError(f"{folder} has no {split} split; it has: {', '.join(there)}")
            if pattern == r".*\.parquet":
                return files
    return []


def from_packed(files: Sequence[Path], src: Path, work: Path) -> Source:
    """Unpack the images into a file in `work`, and list them.

    Raises:
        UserError: a file is damaged, or has no images with labels in it.
        OSError: there is no room.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"unpacked.{owner()}.tmp"
    entries: list[Entry] = []
    classes: list[str] | None = None
    with path.open("wb") as spool:
        for file in files:
            if file.suffix == ".parquet":
                found, names = _from_parquet(file, spool)
                if names is not None:
                    if classes is not None and classes != names:
                        raise UserError(f"{file} lists other classes than {files[0]}")
                    classes = names
            else:
                found = _from_tar(file, spool)
            entries += found
    kind = "parquet files" if files[0].suffix == ".parquet" else "compressed tars"
    if not entries:
        raise UserError(f"{files[0]} and {len(files) - 1} more hold no images")
    source = sorted_source(kind, path, entries, classes or numbered(entries))
    source.archives = [path]
    return source


def _spool(data: bytes, spool: IO[bytes]) -> tuple[int, int]:
    at = spool.tell()
    spool.write(data)
    return len(data), at


def _from_tar(file: Path, spool: IO[bytes]) -> list[Entry]:
    """Unpack a tar such as Hugging Face's ImageNet.

    The class ends the name, as in ILSVRC2012_val_1_n01440764.JPEG; else it is the folder.
    """
    entries = []
    try:
        with tarfile.open(file, "r|gz") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                if not member.isfile() or not is_image_name(member.name):
                    continue
                base = base_of(member.name)
                class_name = base.rpartition(".")[0].rpartition("_")[2]
                if not WNID.fullmatch(class_name):
                    folder = member.name.removeprefix("./").rpartition("/")[0]
                    class_name = folder.partition("/")[2] or folder
                if not class_name:
                    raise UserError(f"{file}: nothing says of which class {base} is")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                size, at = _spool(data, spool)
                entries.append(Entry(class_name, f"{class_name}/{base}", size, at))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{file} is not an intact archive: {printable(str(error))}") from None
    return entries


def _from_parquet(file: Path, spool: IO[bytes]) -> tuple[list[Entry], list[str] | None]:
    """Unpack the images of a parquet file; return its names of classes, too, if it has them."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{file}: parquet files need pyarrow: pip install 'mae-scale[parquet]'"
        ) from None
    try:
        table = parquet.ParquetFile(file)
        image, label = _columns(table.schema_arrow, file)
        names = _class_names(table.schema_arrow, label)
        entries = []
        number = 0
        for batch in table.iter_batches(_BATCH, columns=[image, label] if label else [image]):
            rows = batch.to_pydict()
            for i, value in enumerate(rows[image]):
                data, name = _bytes_of(value)
                where = f"row {number} of {file}"
                number += 1
                if data is None:
                    raise UserError(f"{where} has no bytes of an image in {image}")
                class_name = _class_of(rows[label][i] if label else None, names, where)
                base = base_of(name or "") or f"{file.stem}_{number - 1:08d}.jpg"
                size, at = _spool(data, spool)
                entries.append(Entry(class_name, f"{class_name}/{base}", size, at))
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{file} is not an intact parquet file: {printable(str(error))[:200]}"
        ) from None
    return entries, names


def _columns(schema: Any, file: Path) -> tuple[str, str | None]:
    names = list(schema.names)
    image = next((n for n in ("image", "img", "jpg", "image_bytes", "bytes") if n in names), None)
    if image is None:
        raise UserError(f"{file} has no column image; it has: {', '.join(map(printable, names))}")
    label = next((n for n in ("label", "labels", "fine_label", "cls", "class", "target")
                  if n in names), None)  # fmt: skip
    return image, label


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Read the names that Hugging Face's datasets put into the metadata of the schema."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][label]["names"]
        return [normal(str(name)) for name in names] if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _bytes_of(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return (value, None) if isinstance(value, bytes) else (None, None)


def _class_of(value: Any, names: list[str] | None, where: str) -> str:
    if value is None:
        return "images"
    text = label_text(value)
    if text is None:
        raise UserError(f"{where} has no label")
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise UserError(f"{where} has the label {value}, but there are {len(names)} classes")
        return names[value]
    return text
