"""The shard format: plain WebDataset tars of one split, and what lies beside them.

A folder holds

- ``{split}-{i:06d}.tar``: plain ustar, per sample ``<key>.jpg`` (the image's own bytes) and
  ``<key>.cls`` (its label, in ASCII digits);
- ``manifest.json``: version, split, class names, and per shard file, samples, bytes, SHA-256;
- ``index.npy``: where each image lies in its tar, and its label (`INDEX_DTYPE`), in manifest order;
- ``checksums.npy``: the CRC-32 of each image's bytes, in the same order;
- ``_info.json`` and ``sizes.json``: the same counts as timm and open_clip want them.

The manifest is written last and atomically: a folder without one is not finished.

Shards with annotations have version 2. In the place of ``<key>.cls`` there is ``<key>.json`` (COCO:
the original annotations of the image) or ``<key>.seg.png`` (ADE20K: the class of each pixel), the
index says where it lies too (`ANNOTATED_DTYPE`), and the manifest names the task.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.data.cache import read_remote
from mae_scale.errors import UserError
from mae_scale.files import write_atomically

MANIFEST = "manifest.json"
INDEX = "index.npy"
CHECKSUMS = "checksums.npy"
VERSION = 1
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
NO_LABEL = -1  # in foreign shards whose samples have no class
ANNOTATED_VERSION = 2
ANNOTATED_DTYPE = np.dtype(
    [
        *((name, INDEX_DTYPE[name]) for name in ("offset", "size", "label")),
        ("extra_offset", "<i8"),  # the annotation: where it lies, bytes, CRC-32
        ("extra_size", "<i4"),
        ("extra_checksum", "<u4"),
        ("objects", "<i4"),  # that can be trained on: those that are no crowd and have an area
    ]
)


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest."""

    file: str  # name in the folder; an absolute path or URL in the index of foreign shards
    samples: int
    bytes: int
    sha256: str  # "" where nobody has computed it (remote foreign shards)


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split, as a loader reads them. Pickles without index and checksums.

    A sample's global id is its place in manifest order: ``starts[shard] + i``.
    """

    root: str  # folder, or URL prefix
    split: str
    classes: list[str]
    files: Sequence[str]  # absolute path or URL of each shard
    samples: npt.NDArray[np.int64]  # [num_shards]
    bytes: npt.NDArray[np.int64]  # [num_shards], size of each tar
    sha256: Sequence[str]  # of each tar
    starts: npt.NDArray[np.int64]  # [num_shards + 1], cumulative samples
    index: np.ndarray  # [num_samples] of INDEX_DTYPE or ANNOTATED_DTYPE, memory-mapped
    checksums: np.ndarray  # uint32 [num_samples], CRC-32 of each image's bytes, memory-mapped
    fingerprint: str  # SHA-256 of manifest.json
    index_file: str
    checksums_file: str
    task: str = "classification"  # or detection, or segmentation: what the samples hold
    categories: Sequence[dict[str, Any]] = ()  # of detection: as the COCO file lists them

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "index": None, "checksums": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["index"] = np.load(self.index_file, mmap_mode="r")
        self.__dict__["checksums"] = np.load(self.checksums_file, mmap_mode="r")


def is_remote(spec: str) -> bool:
    """Whether a shard or folder is named by a URL or a ``pipe:`` command, not by a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", spec) is not None and not spec.startswith("file:")


def join(root: str, name: str) -> str:
    """The path or URL of a file of the set; absolute names and URLs stand for themselves.

    In ``pipe:`` specs, ``{}`` stands for the file name: ``pipe:aws s3 cp s3://bucket/train/{} -``.
    """
    if is_remote(name) or Path(name).is_absolute():
        return name
    if "{}" in root:
        return root.replace("{}", name)
    return f"{root.rstrip('/')}/{name}"


def _open_array(
    path: Path | str, name: str, dtype: np.dtype, expected: int, root: str
) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root}: {name} cannot be read ({error}); make the shards again"
        ) from error
    if array.dtype != dtype or array.shape != (expected,):
        raise UserError(
            f"{root}: {name} does not belong to {MANIFEST} "
            f"({array.shape} entries of {array.dtype}, expected {expected} of {dtype})"
        )
    return array


def _fetch(root: str, cache_dir: Path) -> tuple[bytes, Path, Path]:
    """Manifest, index and checksums of a remote set; the two are kept under their content."""
    names = (MANIFEST, INDEX, CHECKSUMS)
    try:
        manifest, *arrays = (read_remote(join(root, name)) for name in names)
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root} cannot be opened: {error}") from error
    paths = []
    for name, content in zip(names[1:], arrays, strict=True):
        digest = hashlib.sha256(manifest + content).hexdigest()[:32]
        path = cache_dir / f"{Path(name).stem}-{digest}.npy"
        if not path.exists():
            write_atomically(path, content)
        paths.append(path)
    return manifest, paths[0], paths[1]


def open_shards(spec: str | Path, cache_dir: str | Path | None = None) -> ShardSet:
    """Open the shards of one split.

    Args:
        spec: folder with a manifest; or, for remote shards, a URL prefix (``https://…/train``)
            or a ``pipe:`` command in which ``{}`` stands for the file name.
        cache_dir: where the index of remote shards is kept.

    Raises:
        UserError: nothing is there, it is not a finished shard folder, or it holds no samples.
    """
    root = str(spec)
    if is_remote(root):
        if cache_dir is None:
            raise UserError(
                f"{root}: remote shards need a folder for what is fetched (data.cache_dir)"
            )
        content, index_path, checksums_path = _fetch(root, Path(cache_dir))
    else:
        folder = Path(root)
        root = str(folder.resolve())
        index_path, checksums_path = folder / INDEX, folder / CHECKSUMS
        if not folder.is_dir():
            kind = "is not a folder of shards" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {kind}; make one with data_prep/shard_imagenet.py")
        if not (folder / MANIFEST).is_file():
            raise UserError(_why_no_manifest(folder))
        content = (folder / MANIFEST).read_bytes()

    manifest = _parse(content, root)
    shards = manifest["shards"]
    samples = np.array([shard["samples"] for shard in shards], np.int64)
    starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
    total = int(starts[-1])
    if total == 0:
        raise UserError(f"{root} holds no samples")
    return ShardSet(
        root=root,
        split=manifest["split"],
        classes=manifest["classes"],
        files=[join(root, shard["file"]) for shard in shards],
        samples=samples,
        bytes=np.array([shard["bytes"] for shard in shards], np.int64),
        sha256=[shard["sha256"] for shard in shards],
        starts=starts,
        index=_open_array(index_path, INDEX, _index_dtype(manifest), total, root),
        checksums=_open_array(checksums_path, CHECKSUMS, np.dtype("<u4"), total, root),
        fingerprint=hashlib.sha256(content).hexdigest(),
        index_file=str(index_path.resolve()),
        checksums_file=str(checksums_path.resolve()),
        task=manifest.get("task", "classification"),
        categories=manifest.get("categories", []),
    )


def _index_dtype(manifest: dict[str, Any]) -> np.dtype:
    return INDEX_DTYPE if manifest["version"] == VERSION else ANNOTATED_DTYPE


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a local set.

    Raises:
        UserError: it is damaged, or of another version.
    """
    return _parse((folder / MANIFEST).read_bytes(), str(folder))


def _parse(content: bytes, root: str) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        version = manifest["version"]
        whole = all(s.keys() >= Shard.__annotations__.keys() for s in manifest["shards"])
        if not whole or not manifest.keys() >= {"split", "classes"}:
            raise ValueError("entries are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{root}: {MANIFEST} is damaged ({error}); make the shards again"
        ) from error
    if version not in (VERSION, ANNOTATED_VERSION):
        raise UserError(
            f"{root}: {MANIFEST} has version {version}, this program reads {VERSION} and "
            f"{ANNOTATED_VERSION}"
        )
    return manifest


def _why_no_manifest(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return (
            f"{folder} has tars but no {MANIFEST}: finish them with the same shard_imagenet.py "
            "command, or index foreign tars with data_prep/index_shards.py"
        )
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return f"{folder} has no {MANIFEST}; did you mean {' or '.join(inside)}?"
    return f"{folder} has no {MANIFEST}; make shards with data_prep/shard_imagenet.py"


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
    """Write what lies beside the tars, the manifest last.

    Files for timm and open_clip that somebody else has put there stay as they are.

    Args:
        index: [num_samples] of INDEX_DTYPE, in the order of `shards`; of ANNOTATED_DTYPE where
            there are annotations.
        checksums: uint32 [num_samples], CRC-32 of each image's bytes.
        made_by: what the writer wants to remember of how the shards came about.
        annotations: entries of the manifest that say what the annotations are: at least "task".
    """
    total = sum(shard.samples for shard in shards)
    if index.shape != (total,) or checksums.shape != (total,):
        raise ValueError(f"{index.shape}, {checksums.shape} entries for {total} samples")
    foreign = not (folder / MANIFEST).exists() and "plan" not in made_by
    dtype = INDEX_DTYPE if annotations is None else ANNOTATED_DTYPE
    write_atomically(folder / INDEX, _npy(index.astype(dtype, copy=False)))
    write_atomically(folder / CHECKSUMS, _npy(checksums.astype("<u4", copy=False)))
    for name, content in files_for_others(split, shards).items():
        if not (foreign and (folder / name).exists()):
            write_atomically(folder / name, content)
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


def files_for_others(split: str, shards: Sequence[Shard]) -> dict[str, bytes]:
    """What timm and open_clip read, by file name."""
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
    """JSON as these files carry it."""
    return (json.dumps(value, indent=1) + "\n").encode()
