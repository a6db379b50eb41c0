"""The shard format: plain WebDataset tars of one split, and the files beside them.

A folder holds

- ``{split}-{i:06d}.tar``: plain ustar, per sample ``<key>.jpg`` (the image's own bytes) and
  ``<key>.cls`` (its label, in ASCII digits);
- ``manifest.json``: version, split, class names, and per shard file, samples, bytes, SHA-256;
- ``index.npy``: where each image lies in its tar, and its label (`INDEX_DTYPE`), in manifest order;
- ``checksums.npy``: the CRC-32 of each image's bytes, in the same order;
- ``_info.json`` and ``sizes.json``: the same counts in the forms of timm and open_clip.

The manifest is written last and atomically: a folder without one is not finished.

Shards with annotations have version 2. Instead of ``<key>.cls`` there is ``<key>.json`` (COCO:
the original annotations of the image) or ``<key>.seg.png`` (ADE20K: the class of each pixel), the
index holds its place, too (`ANNOTATED_DTYPE`), and the manifest names the task.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.data.cache import read_remote
from mae_scale.data.formats import MAX_FILE
from mae_scale.data.manifest import (
    ANNOTATED_VERSION,
    MANIFEST,
    VERSION,
    Shard,
    manifest_bytes,
    parse_manifest,
    read_manifest,
)
from mae_scale.data.remote import (
    SCHEMES,
    address_of,
    is_remote,
    join,
    printable,
    scheme_of,
    shown,
)
from mae_scale.errors import UserError
from mae_scale.files import TRUST_INDEX, read_file, require_file, write_atomically

INDEX = "index.npy"
CHECKSUMS = "checksums.npy"
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
NO_LABEL = -1  # label of samples without a class, in foreign shards
ANNOTATED_DTYPE = np.dtype(
    [
        *((name, INDEX_DTYPE[name]) for name in ("offset", "size", "label")),
        ("extra_offset", "<i8"),  # offset, size and CRC-32 of the annotation
        ("extra_size", "<i4"),
        ("extra_checksum", "<u4"),
        ("objects", "<i4"),  # number of objects to train on: no crowd, and with an area
    ]
)
_BLOCK = 1 << 20  # number of entries of the index that are checked together


@dataclass(frozen=True, repr=False)
class ShardSet:
    """The shards of one split, for a loader. A pickle leaves out index and checksums.

    A sample's global id is its place in manifest order: ``starts[shard] + i``.
    """

    root: str  # folder, URL prefix or command, without secrets, for messages
    split: str
    classes: list[str]
    files: Sequence[str]  # absolute path or URL of each shard
    samples: npt.NDArray[np.int64]  # [num_shards], number of samples of each shard
    bytes: npt.NDArray[np.int64]  # [num_shards], size of each tar
    sha256: Sequence[str]  # [num_shards], SHA-256 of each tar
    starts: npt.NDArray[np.int64]  # [num_shards + 1], cumulative samples
    index: np.ndarray  # [num_samples] of INDEX_DTYPE or ANNOTATED_DTYPE, memory-mapped
    checksums: np.ndarray  # uint32 [num_samples], CRC-32 of each image's bytes, memory-mapped
    fingerprint: str  # SHA-256 of manifest.json
    index_file: str
    checksums_file: str
    task: str = "classification"  # "detection" or "segmentation" with annotations
    categories: Sequence[dict[str, Any]] = ()  # categories of detection, as in the COCO file

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return (
            f"ShardSet({self.root!r}, split={self.split!r}: {len(self):,} samples of "
            f"{len(self.classes):,} classes in {len(self.files):,} shards)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "index": None, "checksums": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["index"] = np.load(self.index_file, mmap_mode="r")
        self.__dict__["checksums"] = np.load(self.checksums_file, mmap_mode="r")


def _open_array(path: Path, name: str, dtype: np.dtype, expected: int, root: str) -> np.ndarray:
    try:
        require_file(path)
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's parser of headers raises many kinds of error
        raise UserError(
            f"{root}: {name} cannot be read ({printable(str(error))}); make the shards again"
        ) from None
    if array.dtype != dtype or array.shape != (expected,):
        raise UserError(
            f"{root}: {name} does not belong to {MANIFEST} "
            f"({array.shape} entries of {array.dtype}, expected {expected} of {dtype})"
        )
    return array


def _fetch(root: str, cache_dir: Path) -> tuple[bytes, Path, Path]:
    """Fetch manifest, index and checksums of a remote set; store the last two under their hash."""
    names = (MANIFEST, INDEX, CHECKSUMS)
    paths = []
    try:
        manifest, *arrays = (read_remote(join(root, name)) for name in names)
    except OSError as error:
        raise UserError(f"{shown(root)} cannot be opened: {error}") from None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for name, content in zip(names[1:], arrays, strict=True):
            digest = hashlib.sha256(manifest + content).hexdigest()[:32]
            path = cache_dir / f"{Path(name).stem}-{digest}.npy"
            if not path.exists():
                write_atomically(path, content)
            paths.append(path)
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_dir} cannot be written: {error.strerror}; "
            "give another one (cache_dir)"
        ) from None
    return manifest, paths[0], paths[1]


def split_spec(spec: str) -> tuple[str, str | None]:
    """Return the place of the index, and the place of the tars if they lie elsewhere.

    ``FOLDER+COMMAND`` (or ``FOLDER+URL``), with ``{}`` for a tar's name, reads the index in
    FOLDER and the tars through the command. So the command is not written into the index.
    """
    match = re.fullmatch(rf"(.+?)\+((?:{'|'.join(SCHEMES)}):.+)", spec, re.DOTALL)
    if match is None or is_remote(match[1]):
        return spec, None
    if "{}" not in match[2]:
        raise UserError(f"{shown(match[2])} needs a {{}} in the place of a tar's name")
    return match[1], match[2]


def open_shards(spec: str | Path, cache_dir: str | Path | None = None) -> ShardSet:
    """Open the shards of one split.

    Args:
        spec: folder with a manifest; or, for remote shards, a URL prefix (``https://…/train``)
            or a ``pipe:`` command in which ``{}`` stands for the file name; or both, see
            `split_spec`.
        cache_dir: folder in which the index of remote shards is kept.

    Raises:
        UserError: `spec` does not exist, is not a finished shard folder, holds no samples, or its
            manifest names commands or addresses that are not in `spec`, see `TRUST_INDEX`.
    """
    root, tars = split_spec(str(spec))
    if is_remote(root):
        if cache_dir is None:
            raise UserError(
                f"{shown(root)}: remote shards need a folder for what is fetched (cache_dir)"
            )
        content, index_path, checksums_path = _fetch(root, Path(cache_dir))
    else:
        folder = Path(root)
        root = str(folder.resolve())
        index_path, checksums_path = folder / INDEX, folder / CHECKSUMS
        if not folder.is_dir():
            kind = "is not a folder of shards" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {kind}; make one with `mae-scale shard`")
        if not (folder / MANIFEST).is_file():
            raise UserError(_why_no_manifest(folder))
        content = manifest_bytes(folder)

    title = shown(root)
    manifest = parse_manifest(content, title)
    shards = manifest["shards"]
    tars = tars or root
    _check_addresses([shard["file"] for shard in shards], tars, title)
    if scheme_of(tars) == "pipe":
        _check_for_commands(shards, title)
    samples = np.array([shard["samples"] for shard in shards], np.int64)
    starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
    total = int(starts[-1])
    if total == 0:
        raise UserError(f"{title} holds no samples")
    sizes = np.array([shard["bytes"] for shard in shards], np.int64)
    index = _open_array(index_path, INDEX, _index_dtype(manifest), total, title)
    _check_places(index, starts, sizes, [shard["file"] for shard in shards], title)
    _check_labels(index, len(manifest["classes"]), title)
    return ShardSet(
        root=title,
        split=manifest["split"],
        classes=manifest["classes"],
        files=[join(tars, shard["file"]) for shard in shards],
        samples=samples,
        bytes=sizes,
        sha256=[shard["sha256"] for shard in shards],
        starts=starts,
        index=index,
        checksums=_open_array(checksums_path, CHECKSUMS, np.dtype("<u4"), total, title),
        fingerprint=hashlib.sha256(content).hexdigest(),
        index_file=str(index_path.resolve()),
        checksums_file=str(checksums_path.resolve()),
        task=manifest.get("task", "classification"),
        categories=manifest.get("categories", []),
    )


def opened(shards: ShardSet | str | Path, cache_dir: str | Path | None) -> ShardSet:
    """Open the shards of a folder; return shards that are open already unchanged."""
    return shards if isinstance(shards, ShardSet) else open_shards(shards, cache_dir)


def shared_images(one: ShardSet, other: ShardSet) -> int:
    """Count the images of `one` whose size and CRC-32 an image of `other` has, too."""
    own, others = (
        np.asarray(shards.checksums).astype(np.uint64) << np.uint64(32)
        | shards.index["size"].astype(np.uint64)
        for shards in (one, other)
    )
    return int(np.isin(own, others).sum())


def _index_dtype(manifest: dict[str, Any]) -> np.dtype:
    return INDEX_DTYPE if manifest["version"] == VERSION else ANNOTATED_DTYPE


def _check_places(
    index: np.ndarray,
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    files: Sequence[str],
    root: str,
) -> None:
    """Raise a UserError where an image lies outside of its tar."""
    for start in range(0, len(index), _BLOCK):
        block = index[start : start + _BLOCK]
        number = np.searchsorted(starts, np.arange(start, start + len(block)), side="right") - 1
        for prefix, what in (("", "an image"), ("extra_", "an annotation")):
            if f"{prefix}offset" not in (index.dtype.names or ()):
                continue
            offset, size = (block[prefix + key].astype(np.int64) for key in ("offset", "size"))
            wrong = (offset < tarfile.BLOCKSIZE) | (size < 0) | (offset > sizes[number] - size)
            if wrong.any():
                i = int(wrong.argmax())
                raise UserError(
                    f"{root}: {INDEX} has {what} at bytes {offset[i]} to "
                    f"{int(offset[i]) + int(size[i])} of {printable(files[number[i]])}, which has "
                    f"{sizes[number[i]]} bytes by {MANIFEST}; make the shards again"
                )
            if (size > MAX_FILE).any():
                raise UserError(
                    f"{root}: {INDEX} has {what} of {int(size.max()):,} bytes; at most "
                    f"{MAX_FILE:,} are read"
                )


def _check_labels(index: np.ndarray, classes: int, root: str) -> None:
    """Raise a UserError where a label is no class of the manifest."""
    for start in range(0, len(index), _BLOCK):
        labels = index["label"][start : start + _BLOCK]
        wrong = (labels < NO_LABEL) | (labels >= classes)
        if wrong.any():
            raise UserError(
                f"{root}: {INDEX} has the label {labels[wrong.argmax()]}, but {MANIFEST} lists "
                f"{classes} classes; make the shards again"
            )


def _check_addresses(names: Sequence[str], typed: str, root: str) -> None:
    """Raise a UserError if a manifest names a command or address that the user has not typed.

    Args:
        names: names of the tars in the manifest.
        typed: place of the tars, as the user gave it.
        root: name of the set for messages.
    """
    for name in names:
        file = name.rpartition("/")[2]
        typed_it = not is_remote(file) and join(typed, file) == name
        if is_remote(name) and not typed_it and not TRUST_INDEX.given():
            own = "" if is_remote(root) else f"type it ('{root}+{address_of(name)}'), or "
            raise UserError(
                f"{root}: {MANIFEST} names {shown(name)}, a command or address that you have not "
                f"typed; {own}add {TRUST_INDEX.option} if you know who made this index"
            )


def _check_for_commands(shards: Sequence[dict[str, Any]], root: str) -> None:
    """Raise a UserError if a tar's name has characters with a meaning in a shell command."""
    for shard in shards:
        name = shard["file"]
        if not is_remote(name) and re.fullmatch(r"[\w./][\w./=+@%,:-]*", name, re.ASCII) is None:
            raise UserError(
                f"{root}: {MANIFEST} names {printable(name)}, which cannot stand in a command: "
                "letters, digits and ./_=+@%,:- can"
            )


def _why_no_manifest(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return (
            f"{folder} has tars but no {MANIFEST}: finish them with the same `mae-scale shard` "
            "command, or index foreign tars with `mae-scale index`"
        )
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return f"{folder} has no {MANIFEST}; did you mean {' or '.join(inside)}?"
    return f"{folder} has no {MANIFEST}; make shards with `mae-scale shard`"


def write_shard_set(
    folder: Path,
    split: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    index: np.ndarray,
    checksums: np.ndarray,
    made_by: dict[str, Any],
    annotations: dict[str, Any] | None = None,
) -> None:
    """Write the files beside the tars, the manifest last.

    Files for timm and open_clip that somebody else has put there are not replaced.

    Args:
        index: [num_samples] of INDEX_DTYPE, in the order of `shards`; of ANNOTATED_DTYPE if
            there are annotations.
        checksums: uint32 [num_samples], CRC-32 of each image's bytes.
        made_by: entry of the manifest about how the shards were made.
        annotations: entries of the manifest about the annotations, at least "task".
    """
    total = sum(shard.samples for shard in shards)
    if index.shape != (total,) or checksums.shape != (total,):
        raise ValueError(f"{index.shape}, {checksums.shape} entries for {total} samples")
    # Files that this program has written before; the manifest from that time is still there.
    ours = files_for_others(split, _old_shards(folder)) if (folder / MANIFEST).exists() else {}
    dtype = INDEX_DTYPE if annotations is None else ANNOTATED_DTYPE
    write_atomically(folder / INDEX, _npy(index.astype(dtype, copy=False)))
    write_atomically(folder / CHECKSUMS, _npy(checksums.astype("<u4", copy=False)))
    for name, content in files_for_others(split, shards).items():
        path = folder / name
        if "plan" in made_by or not path.exists() or read_file(path) == ours.get(name):
            write_atomically(path, content)
    manifest = {
        "version": VERSION if annotations is None else ANNOTATED_VERSION,
        "split": split,
        **(annotations or {}),
        "classes": list(classes),
        "num_samples": total,
        "shards": [vars(shard) for shard in shards],
        "made_by": made_by,
    }
    write_atomically(folder / MANIFEST, dump(manifest))


def _old_shards(folder: Path) -> list[Shard]:
    return [Shard(**entry) for entry in read_manifest(folder)["shards"]]


def files_for_others(split: str, shards: Sequence[Shard]) -> dict[str, bytes]:
    """Return the files that timm and open_clip read, by name."""
    files = [shard.file for shard in shards]
    samples = [shard.samples for shard in shards]
    info = {
        "name": split,
        "num_samples": sum(samples),
        "filenames": files,
        "shard_lengths": samples,
    }
    return {
        "_info.json": dump({"splits": {split: info}}),
        "sizes.json": dump(dict(zip(files, samples, strict=True))),
    }


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def dump(value: Any) -> bytes:
    """Encode a value as JSON in the form of these files."""
    return (json.dumps(value, indent=1) + "\n").encode()
