"""Checking shards against their manifest, down to each image."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from mae_scale.data.formats import IMAGE_SUFFIXES, MAX_PIXELS, open_image
from mae_scale.data.remote import is_remote, shown
from mae_scale.data.shards import (
    MANIFEST,
    NO_LABEL,
    Shard,
    ShardSet,
    files_for_others,
    open_shards,
    read_manifest,
)
from mae_scale.data.tar import BLOCK, read_header
from mae_scale.errors import UserError
from mae_scale.files import open_descriptor, sha256_of
from mae_scale.sharding.annotated import ENDINGS
from mae_scale.sharding.foreign import split_name
from mae_scale.sharding.images import decode_error
from mae_scale.sharding.labels import label_text, normal
from mae_scale.sharding.processes import run_all, shared
from mae_scale.sharding.tars import lacks_end, walk_tar


@dataclass
class Report:
    """Counts of a folder of shards, and the problems that were found."""

    shards: int
    samples: int
    classes: int
    problems: list[str]  # each names the shard, and the damaged member if there is one
    max_pixels: int = MAX_PIXELS  # images of more pixels were not decoded ...
    allowed: int = MAX_PIXELS  # ... and those of more than this are problems


@dataclass
class _Job:
    shards: ShardSet
    own: bool  # whether this program wrote them, instead of indexing them
    fast: bool
    max_pixels: int
    allowed: int  # limit of pixels that the manifest says the shards were made with
    checked: Any  # number of checked images of each shard, in shared memory


def verify(
    folder: str | Path, *, fast: bool = False, workers: int = 1, max_pixels: int | None = None
) -> Report:
    """Check sizes, SHA-256, tar structure, labels, checksums, and that every image decodes.

    Args:
        fast: whether to leave out the decoding of images.
        workers: number of processes.
        max_pixels: most pixels of an image that is decoded. None: the usual limit; where the
            manifest says that the shards were made with a higher one, larger images are compared
            with their checksum only. A manifest may come from anybody, so it must not choose how
            much memory is taken.

    Raises:
        UserError: there is no finished folder of shards.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        open_shards(folder)  # it raises an error that says what is wrong
    try:
        shards = open_shards(folder)
    except (UserError, OSError, ValueError) as error:
        return Report(0, 0, 0, [str(error)])
    remote = [file for file in shards.files if is_remote(file)]
    if remote:
        raise UserError(
            f"{shown(remote[0])} is not on this machine; only local shards can be verified"
        )
    manifest = read_manifest(folder)
    own = "plan" in manifest.get("made_by", {})
    count = len(shards.files)
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    asked = manifest["made_by"].get("plan", {}).get("max_pixels")
    allowed = max(limit, asked) if max_pixels is None and type(asked) is int else limit
    job = _Job(shards, own, fast, limit, allowed, multiprocessing.RawArray("q", count))
    found = dict(run_all(_verify_shard, range(count), workers, job, job.checked, len(shards)))
    problems = [problem for i in range(count) for problem in found[i]]
    entries = [Shard(**entry) for entry in manifest["shards"]]
    for name, content in files_for_others(shards.split, entries).items() if own else ():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            problems.append(f"{name} is missing or does not agree with {MANIFEST}")
    return Report(count, len(shards), len(shards.classes), problems, limit, allowed)


def _verify_shard(number: int) -> tuple[int, list[str]]:
    job: _Job = shared()
    shards = job.shards
    path = Path(shards.files[number])
    try:
        problems = _problems(job, number, path)
    except OSError as error:
        problems = [f"cannot be read: {error}"]
    job.checked[number] = int(shards.samples[number])
    return number, [f"{path.name}: {problem}" for problem in problems]


def _problems(job: _Job, number: int, path: Path) -> list[str]:
    shards = job.shards
    if not path.exists():
        return ["is missing"]
    problems = []
    size = path.stat().st_size
    if size != shards.bytes[number]:
        problems.append(f"has {size:,} bytes, the manifest says {shards.bytes[number]:,}")
    if sha256_of(path) != shards.sha256[number]:
        problems.append("has another SHA-256 than the manifest says")

    names, labels, images = {}, {}, 0
    descriptor = open_descriptor(path)
    try:
        try:
            for member in walk_tar(path, resync=True):
                if member.problem:
                    continue
                names[member.offset] = member.name
                stem, _, suffix = member.name.rpartition(".")
                images += suffix.lower() in IMAGE_SUFFIXES
                if suffix == "cls":
                    labels[stem] = os.pread(descriptor, member.size, member.offset)
        except UserError as error:
            problems.append(str(error))
        if not job.own:
            problems += _end_problem(path)
        if images < shards.samples[number]:
            problems.append(f"shows {images:,} images of {shards.samples[number]:,}")
        for sample in range(int(shards.starts[number]), int(shards.starts[number + 1])):
            entry = shards.index[sample]
            offset, length, label = (int(entry[key]) for key in ("offset", "size", "label"))
            name = names.get(offset) or _name_before(descriptor, offset)
            data = os.pread(descriptor, length, offset)
            problem = _image_problem(data, length, int(shards.checksums[sample]), job)
            text = labels.get(name.rpartition(".")[0], labels.get(split_name(name)[0]))
            if problem is None and offset not in names:
                problem = "is not where the index says, or a header before it is damaged"
            if (
                problem is None
                and text is not None
                and not _same_label(text, label, shards.classes)
            ):
                problem = f"has the label {text!r}, the index says {label}"
            if problem is not None:
                problems.append(f"{name} {problem}")
            if shards.task != "classification":
                problems += _annotation_problems(shards, sample, descriptor, names, name)
            job.checked[number] += 1
    finally:
        os.close(descriptor)
    return problems


def _image_problem(data: bytes, length: int, checksum: int, job: _Job) -> str | None:
    if len(data) != length:
        return "is cut short"
    large = job.allowed > job.max_pixels and _is_between(data, job.max_pixels, job.allowed)
    reason = None if job.fast or large else decode_error(data, job.max_pixels)
    if reason:
        return f"cannot be decoded: {reason}"
    return "has other bytes than were written" if crc32(data) != checksum else None


def _is_between(data: bytes, low: int, high: int) -> bool:
    """Return whether an image's header says that it has more than `low` pixels, up to `high`."""
    with suppress(Exception), open_image(data, high) as image:  # PIL raises many kinds of error
        return image.width * image.height > low
    return False


def _annotation_problems(
    shards: ShardSet, sample: int, descriptor: int, names: dict[int, str], image: str
) -> list[str]:
    """List what is wrong with the annotation of an image; each line begins with its name."""
    entry = shards.index[sample]
    offset, size = int(entry["extra_offset"]), int(entry["extra_size"])
    name = names.get(offset) or _name_before(descriptor, offset)
    data = os.pread(descriptor, size, offset)
    expected = f"{image.rpartition('.')[0]}.{ENDINGS[shards.task]}"
    problem = None
    if offset not in names or name != expected:
        problem = f"is not {expected}, which belongs to {image}"
    elif len(data) != size:
        problem = "is cut short"
    elif crc32(data) != int(entry["extra_checksum"]):
        problem = "has other bytes than were written"
    return [f"{name} {problem}"] if problem else []


def _same_label(text: bytes, label: int, classes: list[str]) -> bool:
    meant = label_text(text.decode(errors="replace"))
    if meant is None:
        return label == NO_LABEL
    return meant == str(label) or (0 <= label < len(classes) and meant == normal(classes[label]))


def _end_problem(path: Path) -> list[str]:
    """List what is wrong with the end of a tar that another program has written."""
    try:
        for _ in walk_tar(path):
            pass
    except UserError as error:
        return [str(error)]
    return ["has no end marker: it may be cut"] if lacks_end(path) else []


def _name_before(descriptor: int, offset: int) -> str:
    """Read the name in the header before a file's data, for shards that cannot be walked."""
    header = read_header(os.pread(descriptor, BLOCK, max(0, offset - BLOCK)))
    return header.name if header else f"the member at byte {offset:,}"
