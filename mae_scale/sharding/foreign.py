"""Using WebDataset tars that others wrote: an index beside them instead of other tars."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mae_scale.data.cache import open_remote
from mae_scale.data.shards import (
    INDEX_DTYPE,
    MANIFEST,
    NO_LABEL,
    Shard,
    is_remote,
    read_manifest,
    write_shard_set,
)
from mae_scale.errors import UserError
from mae_scale.sharding.processes import run_all, shared
from mae_scale.sharding.verify import split_key

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first that a sample has is its image
LABEL_KEYS = ("label", "cls", "class", "target")  # in .json


class Found(NamedTuple):
    """A file in a tar that matters: an image's place, or a label's text."""

    key: str
    suffix: str
    offset: int
    size: int
    checksum: int
    content: bytes  # of labels


@dataclass
class Indexed:
    """What one tar holds."""

    shard: Shard
    images: list[tuple[int, int, int]]  # offset, size, CRC-32
    labels: list[str | None]


@dataclass
class _Job:
    label_keys: Sequence[str]
    read: Any  # bytes read of each tar, shared memory


def index_shards(
    specs: Sequence[str],
    out: str | Path | None = None,
    *,
    split: str = "train",
    label_key: str | None = None,
    workers: int = 1,
) -> tuple[Path, int, int, int]:
    """Write manifest and index of foreign tars; the tars stay as they are.

    A label is an integer, or a name that becomes its place among the sorted names; it is read
    from ``.cls`` or from ``.json``. Samples without one get NO_LABEL.

    Args:
        specs: folders, tars, URLs or ``pipe:`` commands, with braces expanded (``{000..127}``).
        out: folder for the index; by default the one that holds all the tars.
        label_key: key of the label in ``.json``; by default one of LABEL_KEYS.

    Returns:
        The folder, and how many shards, samples, and samples without label it has.

    Raises:
        UserError: nothing is there, a tar is damaged or compressed, or labels make no sense.
    """
    files = [file for spec in specs for file in _expand(spec)]
    folder = _index_folder(files, out)
    keys = (label_key,) if label_key else LABEL_KEYS
    job = _Job(keys, multiprocessing.RawArray("q", len(files)))
    numbered = list(enumerate(files))
    found = dict(run_all(_index_tar, numbered, workers, job, job.read, _total(files), "bytes"))
    tars = [found[i] for i in range(len(files))]
    tars = [tar for tar in tars if tar.images]
    if not tars:
        raise UserError(
            f"{' '.join(specs)}: no images (.{', .'.join(IMAGES)}) in {len(files)} tars"
        )

    labels, classes = _number([label for tar in tars for label in tar.labels])
    images = np.array([image for tar in tars for image in tar.images], np.int64)
    index = np.empty(len(images), INDEX_DTYPE)
    index["offset"], index["size"], index["label"] = images[:, 0], images[:, 1], labels
    shards = [_relative(tar.shard, folder) for tar in tars]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made_by = {"indexed": list(specs)}
        write_shard_set(folder, split, classes, shards, index, images[:, 2], made_by)
    except PermissionError as error:
        raise UserError(f"{folder} cannot be written; give another folder with --out") from error
    return folder, len(shards), len(index), int((labels == NO_LABEL).sum())


def _expand(spec: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if not is_remote(spec) and Path(spec).is_dir():
        tars = sorted(str(path) for path in Path(spec).glob("*.tar"))
        if not tars:
            raise UserError(f"{spec} holds no tars")
        return tars
    files = list(expand_urls(spec))
    for file in files:
        if not is_remote(file) and not Path(file).is_file():
            raise UserError(f"{file} does not exist" + (f" ({spec})" if file != spec else ""))
    return files


def _index_folder(files: Sequence[str], out: str | Path | None) -> Path:
    if out is not None:
        folder = Path(out)
    else:
        parents = {None if is_remote(f) else Path(f).resolve().parent for f in files}
        parent = parents.pop()
        if parents or parent is None:
            raise UserError("the tars lie in several folders or elsewhere; give one with --out")
        folder = parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if (folder / MANIFEST).exists() and "indexed" not in read_manifest(folder).get("made_by", {}):
        raise UserError(f"{folder} has a {MANIFEST} already, which shard_imagenet.py has written")
    return folder


def _relative(shard: Shard, folder: Path) -> Shard:
    if is_remote(shard.file):
        return shard
    path = Path(shard.file).resolve()
    name = path.name if path.parent == folder.resolve() else str(path)
    return Shard(name, shard.samples, shard.bytes, shard.sha256)


def _number(labels: list[str | None]) -> tuple[np.ndarray, list[str]]:
    """Labels as int32 [n], and the class names."""
    known = {label for label in labels if label is not None}
    try:
        number = {label: int(label) for label in known}
        classes = [str(i) for i in range(max(number.values(), default=-1) + 1)]
    except ValueError:
        classes = sorted(known)
        number = {name: i for i, name in enumerate(classes)}
    if any(n < 0 for n in number.values()):
        raise UserError(f"labels below 0, such as {min(number.values())}, are no classes")
    numbers = [NO_LABEL if label is None else number[label] for label in labels]
    return np.array(numbers, np.int32), classes


# One tar, read once from front to back, so that remote ones work the same


class _Counted:
    """A stream that hashes and counts what passes."""

    def __init__(self, stream: IO[bytes], counter: Any, place: int) -> None:
        self.stream, self.counter, self.place = stream, counter, place
        self.digest = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        self.counter[self.place] = self.bytes
        return data


def _index_tar(numbered: tuple[int, str]) -> tuple[int, Indexed]:
    job: _Job = shared()
    number, file = numbered
    try:
        with open_remote(file) if is_remote(file) else Path(file).open("rb") as raw:
            stream = _Counted(raw, job.read, number)
            images, labels = _samples(_read_members(stream, file), file, job.label_keys)
            while stream.read(1 << 20):
                pass
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    shard = Shard(file, len(images), stream.bytes, stream.digest.hexdigest())
    return number, Indexed(shard, images, labels)


def _read_members(stream: _Counted, file: str) -> Iterator[Found]:
    try:
        # tarfile knows the long names of GNU and pax; "r|" never seeks.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []
                key, suffix = split_key(member.name)
                if not member.isfile() or not (suffix in IMAGES or suffix in ("cls", "json")):
                    continue
                data = tar.extractfile(member).read()
                if len(data) != member.size:
                    raise UserError(f"{file} ends inside {member.name}: it is cut short")
                image = suffix in IMAGES
                yield Found(
                    key,
                    suffix,
                    member.offset_data,
                    member.size,
                    zlib.crc32(data) if image else 0,
                    b"" if image else data,
                )
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{file} is no intact tar ({error}); compressed tars must be unpacked, "
            "since images are read by their place"
        ) from error


def _samples(
    found: Iterable[Found], file: str, label_keys: Sequence[str]
) -> tuple[list[tuple[int, int, int]], list[str | None]]:
    """Images and labels; files that follow each other under one key are one sample."""
    images: list[tuple[int, int, int]] = []
    labels: list[str | None] = []
    for key, group in groupby(found, lambda f: f.key):
        files = {f.suffix: f for f in group}
        image = next((files[suffix] for suffix in IMAGES if suffix in files), None)
        if image is not None:
            images.append((image.offset, image.size, image.checksum))
            labels.append(_label(files, f"{file}: {key}", label_keys))
    return images, labels


def _label(files: dict[str, Found], where: str, label_keys: Sequence[str]) -> str | None:
    if "cls" in files:
        return files["cls"].content.decode("utf-8", "replace").strip()
    if "json" not in files:
        return None
    try:
        content = json.loads(files["json"].content)
    except ValueError as error:
        raise UserError(f"{where}.json is not JSON: {error}") from error
    for key in label_keys:
        if isinstance(content, dict) and isinstance(content.get(key), (int, str)):
            return str(content[key])
    return None


def _total(files: Sequence[str]) -> int:
    return sum(Path(f).stat().st_size for f in files if not is_remote(f))
