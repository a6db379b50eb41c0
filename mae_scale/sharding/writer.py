"""Writing one shard, whole or not at all, and the record of the finished shard."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from mae_scale.data.tar import make_header
from mae_scale.errors import RunError
from mae_scale.files import (
    Digest,
    create_file,
    host_label,
    owner,
    read_file,
    sha256_of,
    write_atomically,
)
from mae_scale.launch.console import size_text
from mae_scale.sharding.annotated import AnnotatedSource
from mae_scale.sharding.images import image_damage, shrink
from mae_scale.sharding.plan import Plan
from mae_scale.sharding.processes import shared

WORK = ".sharding"  # subfolder for unfinished work
_THREADS = 2  # number of threads of each process that read ahead
_PARTS = 1000  # number of parts that one call may write (IOV_MAX is 1024)
_PIECE_BYTES = 2_000_000  # bytes of images that a thread takes at a time


class ShardingError(RunError):
    """Sharding failed for a reason other than its input; the same command goes on later."""


@dataclass
class Job:
    """Data that the writer processes share."""

    plan: Plan
    out: Path
    written: Any  # number of finished images of each shard, in shared memory


def write_shard(shard: int) -> dict[str, Any]:
    """Write a shard and then its record, each atomically; return the record. Runs in a worker."""
    job: Job = shared()
    finished = read_record(job.out, job.plan, shard)
    if finished is not None:  # another run has written it in the meantime
        return finished
    name = job.plan.file(shard)
    temporary = job.out / WORK / f"{name}.{owner()}.tmp"
    try:
        with create_file(temporary) as stream:
            record = _fill(job, shard, stream)
        if record["samples"]:
            # Waiting until the tar is on the disk would take as long as writing it; after a
            # restart of the machine its checksum shows whether it is (see read_record).
            record |= {
                "mtime_ns": temporary.stat().st_mtime_ns,
                "host": host_label(),
                "boot": boot(),
            }
            temporary.replace(job.out / name)
        write_atomically(record_path(job.out, job.plan, shard), json.dumps(record).encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(job.out).free
            raise ShardingError(
                f"no room for {name} ({size_text(job.plan.bytes(shard))}) in {job.out}: "
                f"{error.strerror}, {size_text(free)} free"
            ) from error
        raise ShardingError(f"cannot write {name}: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return record


@dataclass
class _Piece:
    """Some samples that follow each other in the tar."""

    parts: list[bytes]  # not joined, because copying takes as long as hashing
    size: int  # bytes
    index: list[tuple[int, ...]]  # fields of INDEX_DTYPE or ANNOTATED_DTYPE, offsets in the piece
    checksums: list[int]
    damaged: list[tuple[str, str]]  # name and reason


def _fill(job: Job, shard: int, stream: Any) -> dict[str, Any]:
    digest = Digest()
    index, checksums, damaged = [], [], []
    at = 0
    for piece in _read_ahead(job.plan, job.plan.images(shard)):
        for part in piece.parts:
            digest.update(part)
        _write(stream.fileno(), piece.parts)
        index += [_moved(entry, at) for entry in piece.index]
        at += piece.size
        checksums += piece.checksums
        damaged += piece.damaged
        job.written[shard] = len(index) + len(damaged)
    end = bytes(2 * tarfile.BLOCKSIZE)
    end += bytes(-(at + len(end)) % tarfile.RECORDSIZE)
    digest.update(end)
    _write(stream.fileno(), [end])
    return {
        "file": job.plan.file(shard),
        "samples": len(index),
        "bytes": at + len(end),
        "sha256": digest.sha256,
        "index": index,
        "checksums": checksums,
        "damaged": damaged,
    }


def _write(descriptor: int, parts: list[bytes]) -> None:
    """Write parts one after the other, without joining them in memory first."""
    for i in range(0, len(parts), _PARTS):
        some = parts[i : i + _PARTS]
        left = sum(map(len, some)) - os.writev(descriptor, some)
        if left:  # a disk that is almost full accepts only a part
            rest = memoryview(b"".join(some))[-left:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]


def _moved(entry: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Return an entry of the index with `at` added to its offsets."""
    moved = (entry[0] + at, *entry[1:3])
    return moved if len(entry) == 3 else (*moved, entry[3] + at, *entry[4:])


def _read_ahead(plan: Plan, places: npt.NDArray[np.int64]) -> Iterator[_Piece]:
    """Yield the samples at these places of the source, in order; threads prepare the next ones.

    This hides the latency of network file systems, and shares the work: reading, checksums,
    hashing, writing and decoding all release the interpreter's lock.
    """
    ends = np.cumsum(plan.source.sizes[places]) // _PIECE_BYTES
    pieces = np.split(places, np.flatnonzero(np.diff(ends)) + 1)
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: deque[Future[_Piece]] = deque()
        for piece in pieces:
            pending.append(pool.submit(_prepare, plan, piece.tolist()))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _prepare(plan: Plan, places: list[int]) -> _Piece:
    piece = _Piece([], 0, [], [], [])
    for place in places:
        data, reason = _image(plan, place)
        if reason is not None:
            piece.damaged.append((plan.source.title(place), reason))
            continue
        key, label = plan.keys[place], int(plan.source.labels[place])
        entry: tuple[int, ...] = (piece.size + tarfile.BLOCKSIZE, len(data), label)
        if isinstance(plan.source, AnnotatedSource):
            ending, extra = plan.source.ending, plan.source.annotation(place)
            after = piece.size + 2 * tarfile.BLOCKSIZE + len(data) + -len(data) % tarfile.BLOCKSIZE
            objects = int(plan.source.objects[place])
            entry = (*entry, after, len(extra), crc32(extra), objects)
        else:
            ending, extra = "cls", b"%d" % label
        piece.index.append(entry)
        piece.checksums.append(crc32(data))
        behind = (
            bytes(-len(data) % tarfile.BLOCKSIZE),
            make_header(f"{key}.{ending}", len(extra)),
            extra,
            bytes(-len(extra) % tarfile.BLOCKSIZE),
        )
        sample = (make_header(key + ".jpg", len(data)), data, b"".join(behind))
        piece.parts += sample
        piece.size += sum(map(len, sample))
    return piece


def _image(plan: Plan, place: int) -> tuple[bytes, str | None]:
    """Return an image's bytes for the shard, and the reason why it is damaged, or None."""
    try:
        data = plan.source.read(place)
    except OSError as error:
        raise ShardingError(f"cannot read {plan.source.title(place)}: {error}") from error
    options = plan.options
    reason = image_damage(data, options.max_pixels)
    if reason is None and options.resize_short:
        try:
            data = shrink(data, options.resize_short, options.quality, options.max_pixels)
        except Exception as error:  # PIL's errors for damaged images have no common class
            reason = str(error) or type(error).__name__
    return data, reason


def record_path(out: Path, plan: Plan, shard: int) -> Path:
    """Return the path of the record that a shard is finished."""
    return out / WORK / f"{plan.file(shard)}.json"


def read_record(out: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """Return the record of a finished shard; None if there is none or the tar does not match it."""
    try:
        record = json.loads(read_file(record_path(out, plan, shard)))
        if record["samples"] == 0:
            return record
        tar = out / record["file"]
        state = tar.stat()
        if state.st_size != record["bytes"]:
            return None
        touched = state.st_mtime_ns != record["mtime_ns"]
        restarted = record["host"] == host_label() and record["boot"] != boot()
        if (touched or restarted) and sha256_of(tar) != record["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def boot() -> str:
    """Return an identifier of the machine's last start; empty where the kernel has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
