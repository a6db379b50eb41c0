"""Writing one shard, all or nothing, and the record that it is finished."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import socket
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.data.console import size_text
from mae_scale.data.images import damage, shrink
from mae_scale.data.processes import shared
from mae_scale.data.shard_plan import Plan
from mae_scale.data.shards import write_atomically

WORK = ".sharding"  # subfolder for what is under way
_THREADS = 2  # of each process, that read ahead
_CHUNK = 16  # images that a thread takes at a time


class ShardingError(Exception):
    """Sharding failed for a reason outside of its input; the same command goes on."""


@dataclass
class Job:
    """What the writer processes share."""

    plan: Plan
    out: Path
    owner: str  # marks this run's unfinished files
    written: Any  # images done of each shard, shared memory


_EMPTY_HEADER = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
_EMPTY_HEADER[148:156] = b" " * 8  # the checksum counts itself as spaces


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of an ASCII name of up to 100 bytes; owner, group and times are zero.

    What ``TarInfo.tobuf`` gives, several times faster.
    """
    header = _EMPTY_HEADER.copy()
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def write_shard(shard: int) -> dict[str, Any]:
    """Write a shard and then its record, each atomically; in a worker process."""
    job: Job = shared()
    finished = read_record(job.out, job.plan, shard)
    if finished is not None:  # another run has written it in the meantime
        return finished
    name = job.plan.file(shard)
    temporary = job.out / WORK / f"{name}.{job.owner}.tmp"
    try:
        with temporary.open("wb", buffering=1 << 20) as stream:
            record = _fill(job, shard, stream)
        if record["samples"]:
            # Waiting until the tar is on the disk would take as long as writing it; after a
            # restart of the machine its checksum tells (see read_record).
            record |= {"mtime_ns": temporary.stat().st_mtime_ns, "host": host(), "boot": boot()}
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
class _Sample:
    """An image on its way into the shard."""

    place: int  # in the source
    data: bytes
    checksum: int
    damage: str | None


def _fill(job: Job, shard: int, stream: Any) -> dict[str, Any]:
    plan = job.plan
    digest = hashlib.sha256()
    index, checksums, damaged = [], [], []
    at = 0
    for done, sample in enumerate(_read_ahead(plan, plan.images(shard)), 1):
        if sample.damage is None:
            key, label = plan.keys[sample.place], int(plan.source.labels[sample.place])
            size, cls = len(sample.data), b"%d" % label
            index.append((at + tarfile.BLOCKSIZE, size, label))
            checksums.append(sample.checksum)
            label_file = tar_header(key + ".cls", len(cls)) + cls.ljust(tarfile.BLOCKSIZE, b"\0")
            parts = (
                tar_header(key + ".jpg", size),
                sample.data,
                bytes(-size % tarfile.BLOCKSIZE) + label_file,
            )
            for part in parts:
                digest.update(part)
                stream.write(part)
                at += len(part)
        else:
            damaged.append((plan.source.title(sample.place), sample.damage))
        job.written[shard] = done
    end = bytes(2 * tarfile.BLOCKSIZE)
    end += bytes(-(at + len(end)) % tarfile.RECORDSIZE)
    digest.update(end)
    stream.write(end)
    return {
        "file": plan.file(shard),
        "samples": len(index),
        "bytes": at + len(end),
        "sha256": digest.hexdigest(),
        "index": index,
        "checksums": checksums,
        "damaged": damaged,
    }


def _read_ahead(plan: Plan, places: npt.NDArray[np.int64]) -> Iterator[_Sample]:
    """Samples in order; threads read, check and shrink the next ones.

    They hide the latency of network file systems, and share the work: reading, checksums and
    decoding leave the interpreter to other threads.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: deque[Future[list[_Sample]]] = deque()
        for first in range(0, len(places), _CHUNK):
            chunk = places[first : first + _CHUNK].tolist()
            pending.append(pool.submit(lambda chunk: [_sample(plan, i) for i in chunk], chunk))
            if len(pending) > _THREADS:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _sample(plan: Plan, place: int) -> _Sample:
    try:
        data = plan.source.read(place)
    except OSError as error:
        raise ShardingError(f"cannot read {plan.source.title(place)}: {error}") from error
    reason = damage(data)
    options = plan.options
    if reason is None and options.resize_short:
        try:
            data = shrink(data, options.resize_short, options.quality)
        except Exception as error:  # what PIL raises on damaged images has no common class
            reason = str(error) or type(error).__name__
    return _Sample(place, data, zlib.crc32(data), reason)


def record_path(out: Path, plan: Plan, shard: int) -> Path:
    return out / WORK / f"{plan.file(shard)}.json"


def read_record(out: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """The record of a finished shard, if it has one and the tar is what it says."""
    try:
        record = json.loads(record_path(out, plan, shard).read_bytes())
        if record["samples"] == 0:
            return record
        tar = out / record["file"]
        state = tar.stat()
        if state.st_size != record["bytes"]:
            return None
        touched = state.st_mtime_ns != record["mtime_ns"]
        restarted = record["host"] == host() and record["boot"] != boot()
        if (touched or restarted) and sha256_of(tar) != record["sha256"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return record


def host() -> str:
    """This machine, as part of a file name."""
    return re.sub("[^A-Za-z0-9]", "_", socket.gethostname())


def boot() -> str:
    """Another value after each start of the machine; empty where the kernel has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
