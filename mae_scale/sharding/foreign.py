"""Indexing WebDataset tars that others wrote, so that the tars can be used unchanged."""

from __future__ import annotations

import errno
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from mae_scale.data.formats import (
    ARRAY_SUFFIX,
    IMAGE_SUFFIXES,
    MAX_FILE,
    MAX_PIXELS,
    TooLarge,
    is_array,
    jpeg_frame,
    open_image,
    read_array,
)
from mae_scale.data.formats import check_pixels as check_size
from mae_scale.data.remote import (
    address_of,
    is_remote,
    open_remote,
    printable,
    shown,
)
from mae_scale.data.shards import (
    INDEX_DTYPE,
    NO_LABEL,
    Shard,
    write_shard_set,
)
from mae_scale.errors import RunError, UserError
from mae_scale.files import Digest, open_file
from mae_scale.launch.console import warn
from mae_scale.sharding.labels import LABEL_KEYS, label_in_json, label_in_text, number_labels
from mae_scale.sharding.places import (
    check_old_index,
    expand,
    hide_commands,
    index_folder,
    one_family,
)
from mae_scale.sharding.processes import run_all, shared
from mae_scale.sharding.tars import Tail, problem_of, stream_tar


class SampleFile(NamedTuple):
    """A file in a tar: an image with its place, a label with its content, or only a name."""

    key: str  # file name up to its first dot, as in WebDataset
    part: str  # part between the first and the last dot; usually empty
    suffix: str  # part behind the last dot, in lower case
    offset: int = 0
    size: int = 0
    checksum: int = 0
    content: bytes = b""  # content of a label
    problem: str = ""  # reason why an image cannot be taken; empty if it can


@dataclass
class Indexed:
    """Samples that were found in one tar."""

    shard: Shard
    images: list[tuple[int, int, int]]  # offset, size and CRC-32 of each
    labels: list[str | None]
    left_out: list[tuple[str, str]]  # sample and reason, if it has no usable image
    json_keys: Counter[str]
    has_end: bool


@dataclass
class Report:
    """Counts of a finished index, and the value with which training reads it."""

    folder: Path
    shards: int
    samples: int
    unlabelled: int
    left_out: int
    reads_with: str | None = None  # value for data.train, if it is not the folder
    open_with: str | None = None  # the same with its secrets, which are never printed
    reasons: Counter[str] = field(default_factory=Counter)  # of what was left out


@dataclass
class _Job:
    label_keys: Sequence[str]
    image_key: str | None
    max_pixels: int
    read: Any  # number of bytes read of each tar, in shared memory


def index_shards(
    specs: Sequence[str],
    out: str | Path | None = None,
    *,
    split: str = "train",
    pattern: str | None = None,
    label_key: str | None = None,
    image_key: str | None = None,
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
) -> Report:
    """Write manifest and index of foreign tars; the tars are not changed.

    A label is read from ``.cls`` or from ``.json``. It is a number or a name; the number of a name
    is its place among the sorted names. Samples without a label get NO_LABEL. Warnings name the
    samples that are left out.

    Args:
        specs: folders, tars, URLs or ``pipe:`` commands; braces (``{000..127}``) are expanded.
        out: folder for the index; by default the folder that holds all tars.
        split: name of the split that the tars hold.
        pattern: take only tars whose name matches this shell pattern; see `one_family`.
        label_key: key of the label in ``.json``; by default one of LABEL_KEYS.
        image_key: image to take from samples with several images, such as ``input.jpg``.
        classes: names of the classes in the order of their numbers; by default the names found.
        max_pixels: larger images are left out.
        workers: number of processes that read tars.

    Raises:
        UserError: there are no images, the names of the tars are of several families, a tar is
            damaged or compressed, or labels make no sense.
        RunError: the disk is full.
    """
    files = [file for spec in specs for file in expand(spec)]
    files = one_family(files, pattern, specs)
    folder = index_folder(files, out)
    command, names = hide_commands(files, folder)
    check_old_index(folder, split, names)
    keys = (label_key,) if label_key else LABEL_KEYS
    job = _Job(keys, image_key, max_pixels, multiprocessing.RawArray("q", len(files)))
    numbered = list(enumerate(files))
    found = dict(run_all(_index_tar, numbered, workers, job, job.read, _total(files), "bytes"))
    for i, name in enumerate(names):
        found[i].shard = Shard(name, *list(vars(found[i].shard).values())[1:])
    tars = [found[i] for i in range(len(files)) if found[i].images]
    left_out = sum(len(found[i].left_out) for i in range(len(files)))
    if not tars:
        why = Counter(reason for tar in found.values() for _, reason in tar.left_out)
        raise UserError(
            f"{' '.join(map(shown, specs))}: no images (.{', .'.join(IMAGE_SUFFIXES)}) in "
            f"{len(files)} tars"
            + (f"; {left_out:,} samples have none: {why.most_common(1)[0][0]}" if why else "")
        )
    for i, file in enumerate(files):
        _warn_of(found[i], shown(file))
    texts = [label for tar in tars for label in tar.labels]
    if label_key and not any(texts):
        there = sum((tar.json_keys for tar in tars), Counter())
        raise UserError(
            f"no sample has a label under the key {label_key} in its .json; keys there: "
            f"{', '.join(printable(key) for key, _ in there.most_common(12)) or 'none'}"
        )
    labels, names_of_classes = number_labels(texts, classes)
    images = np.array([image for tar in tars for image in tar.images], np.int64)
    index = np.empty(len(images), INDEX_DTYPE)
    index["offset"], index["size"], index["label"] = images[:, 0], images[:, 1], labels
    shards = [tar.shard for tar in tars]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made_by = {"indexed": [shown(spec) for spec in specs]}
        write_shard_set(folder, split, names_of_classes, shards, index, images[:, 2], made_by)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    unlabelled = int((labels == NO_LABEL).sum())
    remote = next((name for name in names if is_remote(name)), None)
    given = shown(command) if command else address_of(remote) if remote else None
    reads_with = f"{folder}+{given}" if given else None
    secret = command or (address_of(remote) if remote else None)
    open_with = f"{folder}+{secret}" if secret else None
    reasons = Counter(reason for tar in found.values() for _, reason in tar.left_out)
    return Report(
        folder, len(shards), len(index), unlabelled, left_out, reads_with, open_with, reasons
    )


def _cannot_write(folder: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(f"no room in {folder} for the index: {error.strerror}")
    return UserError(
        f"{folder} cannot be written ({error.strerror}); give another folder for the index (--out)"
    )


def _warn_of(tar: Indexed, file: str) -> None:
    """Warn of what was left out of a tar and why, with an example for each reason."""
    kinds = Counter(reason for _, reason in tar.left_out)
    for reason, count in kinds.items():
        example = next(printable(key) for key, r in tar.left_out if r == reason)
        warn(f"warning: {file}: {count:,} left out: {reason} (such as {example})")
    if not tar.has_end:
        warn(
            f"warning: {file} has no end marker behind byte {tar.shard.bytes:,}: it may be cut; "
            f"{len(tar.images):,} images were found"
        )


# Each tar is read once from front to back, so that remote ones work in the same manner.


class _Counted(Tail):
    """A stream that hashes and counts the bytes read from it."""

    def __init__(self, stream: IO[bytes], counter: Any, place: int) -> None:
        super().__init__(stream)
        self.counter, self.place = counter, place
        self.digest = Digest()

    def passed(self, data: bytes) -> None:
        self.digest.update(data)
        self.counter[self.place] = self.bytes


def _index_tar(numbered: tuple[int, str]) -> tuple[int, Indexed]:
    job: _Job = shared()
    number, file = numbered
    try:
        with open_remote(file) if is_remote(file) else open_file(file) as raw:
            stream = _Counted(raw, job.read, number)
            tar = Indexed(Shard(file, 0, 0, ""), [], [], [], Counter(), True)
            _take_samples(_read_members(stream, file, job), tar, shown(file), job)
    except OSError as error:
        reason = error.strerror or "the transfer failed"
        raise UserError(f"{shown(file)} cannot be read: {reason}") from None
    tar.shard = Shard(file, len(tar.images), stream.bytes, stream.digest.sha256)
    tar.has_end = stream.has_end
    return number, tar


def split_name(name: str) -> tuple[str, str, str]:
    """Split a file's name into key, middle part (between first and last dot) and suffix.

    A number between the dots belongs to the key: ``v.1.jpg`` is the image of ``v.1``.
    """
    folder, slash, base = name.rpartition("/")
    first, _, rest = base.partition(".")
    *parts, suffix = rest.split(".")
    while parts and parts[0].isdigit():
        first += "." + parts.pop(0)
    return folder + slash + first, ".".join(parts), suffix.lower()


def _read_members(stream: _Counted, file: str, job: _Job) -> Iterator[SampleFile]:
    for member, tar in stream_tar(stream, file):
        base = member.name.rpartition("/")[2]
        if member.isdir() or base.startswith("."):
            continue
        key, part, suffix = split_name(member.name)
        image, label = suffix in IMAGE_SUFFIXES, suffix in ("cls", "json")
        if not (image or label):
            yield SampleFile(key, part, suffix)
        elif not member.isreg() or member.issparse():
            yield SampleFile(key, part, suffix, problem=problem_of(member) or "it is no file")
        elif member.size > MAX_FILE:
            problem = f"it has more than {MAX_FILE:,} bytes"
            yield SampleFile(key, part, suffix, problem=problem)
        else:
            try:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
            except tarfile.TarError:
                data = b""
            if len(data) != member.size:
                name = printable(member.name)
                raise UserError(f"{shown(file)} ends inside {name}: it is cut short")
            place = member.offset_data, member.size
            if image:
                problem = _image_problem(data, job.max_pixels)
                yield SampleFile(key, part, suffix, *place, crc32(data), problem=problem)
            else:
                yield SampleFile(key, part, suffix, *place, content=data)


def _image_problem(data: bytes, max_pixels: int) -> str:
    """Return the reason, by its header, why an image cannot be taken; empty if it can."""
    try:
        if not data:
            return "the image is empty"
        if frame := jpeg_frame(data):
            check_size(frame.width, frame.height, max_pixels)
        elif is_array(data):
            read_array(data, max_pixels)
        else:
            open_image(data, max_pixels).close()
    except TooLarge:
        return f"the image has more than {max_pixels:,} pixels"
    except Exception:  # damage is reported by the code that decodes the image
        return ""
    return ""


def _take_samples(found: Iterable[SampleFile], tar: Indexed, file: str, job: _Job) -> None:
    """Collect images and labels; files that follow each other under one key are one sample.

    If all images come before all labels, because files were packed by suffix, a label is found by
    its key.
    """
    no_label: dict[str, int] = {}  # key of an image without a label -> its place
    no_image: dict[str, str | None] = {}  # key of a label without an image -> the label
    for key, group in groupby(found, lambda f: f.key):
        files = list(group)
        images = [f for f in files if f.suffix in IMAGE_SUFFIXES]
        # Beside an image of another format, an array is an annotation.
        images = [f for f in images if f.suffix != ARRAY_SUFFIX] or images
        chosen, reason = _choose(images, files, job.image_key)
        for image in images:
            if chosen and image not in chosen and image.part == chosen[0].part:
                tar.left_out.append((f"{key}.{image.suffix}", "another image of its key counts"))
        for image in chosen:
            if image.problem:
                tar.left_out.append((f"{key}.{image.suffix}", image.problem))
        if not chosen:
            if images or {f.suffix for f in files} != {"cls"}:
                tar.left_out.append((key, reason))
            else:
                try:
                    no_image[key] = _label(files, "", f"{file}: {key}", tar, job.label_keys)
                except _TwoLabels as error:
                    tar.left_out.append((key, str(error)))
        for image in chosen:
            if image.problem:
                continue
            try:
                label = _label(files, image.part, f"{file}: {key}", tar, job.label_keys)
            except _TwoLabels as error:
                tar.left_out.append((f"{key}.{image.suffix}", str(error)))
                continue
            if label is None and not any(f.suffix in ("cls", "json") for f in files):
                no_label[key] = len(tar.labels)
            tar.images.append((image.offset, image.size, image.checksum))
            tar.labels.append(label)
    for key, label in no_image.items():
        if key in no_label:
            tar.labels[no_label[key]] = label
        else:
            tar.left_out.append((key, "there is no image, only .cls"))


class _TwoLabels(ValueError):
    """A sample has labels that contradict each other."""


def _choose(
    images: list[SampleFile], files: list[SampleFile], image_key: str | None
) -> tuple[list[SampleFile], str]:
    """Choose the images of a sample, or return the reason why there is none."""
    if image_key is not None:
        wanted = [
            f for f in images if image_key in (f.part, f.suffix, f"{f.part}.{f.suffix}".strip("."))
        ]
        return wanted[:1], f"there is no image {image_key}"
    plain = [f for f in images if not f.part]
    if plain:
        return [min(plain, key=lambda f: IMAGE_SUFFIXES.index(f.suffix))], ""
    parts = {f.part for f in images}
    if len(parts) <= 1:
        return images[:1], "there is no image, only ." + ", .".join(
            sorted({f.suffix for f in files})[:5]
        )
    if parts == {f.part for f in files if f.suffix in ("cls", "json")}:
        return images, ""  # the keys have dots in them, and each image has its own label
    names = ", ".join(sorted(f"{f.part}.{f.suffix}" for f in images)[:4])
    return [], f"the samples have several images, {names}; choose one with --image-key"


def _label(
    files: list[SampleFile], part: str, where: str, tar: Indexed, keys: Sequence[str]
) -> str | None:
    for suffix in ("cls", "json"):
        same = [f for f in files if f.suffix == suffix and f.part in (part, "")]
        if not same:
            continue
        longest = max(len(f.part) for f in same)
        contents = {f.content for f in same if len(f.part) == longest}
        content = contents.pop()
        if suffix == "cls":
            labels = {label_in_text(other, where) for other in {content, *contents}}
            if len(labels) > 1:
                raise _TwoLabels("its labels contradict each other")
            return labels.pop()
        if contents:
            raise _TwoLabels("it has several files .json")
        label, there = label_in_json(content, where, keys)
        tar.json_keys.update(there)
        return label
    return None


def _total(files: Sequence[str]) -> int:
    return sum(Path(f).stat().st_size for f in files if not is_remote(f))
