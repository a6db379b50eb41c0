"""Writing one shard, all or nothing, and the record that it is finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_scale.data.console import size_text
from mae_scale.data.images import damage, shrink
from mae_scale.data.processes import shared
from mae_scale.data.shard_plan import Plan
from mae_scale.data.shards import sync_folder, write_atomically

WORK = ".sharding"  # subfolder for what is under way


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
            stream.flush()
            os.fsync(stream.fileno())
        if record["samples"]:
            record["mtime_ns"] = temporary.stat().st_mtime_ns
            temporary.replace(job.out / name)
            sync_folder(job.out)
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


def _fill(job: Job, shard: int, stream: Any) -> dict[str, Any]:
    plan, options = job.plan, job.plan.options
    digest = hashlib.sha256()
    index, checksums, damaged = [], [], []
    at = 0
    for done, place in enumerate(plan.images(shard)):
        i = int(place)
        try:
            data = plan.source.read(i)
        except OSError as error:
            raise ShardingError(f"cannot read {plan.source.title(i)}: {error}") from error
        reason = damage(data)
        if reason is None and options.resize_short:
            try:
                data = shrink(data, options.resize_short, options.quality)
            except Exception as error:  # what PIL raises on damaged images has no common class
                reason = str(error) or type(error).__name__
        if reason is None:
            label = int(plan.source.labels[i])
            cls = b"%d" % label
            index.append((at + tarfile.BLOCKSIZE, len(data), label))
            checksums.append(zlib.crc32(data))
            parts = (
                tar_header(plan.keys[i] + ".jpg", len(data)),
                data,
                bytes(-len(data) % tarfile.BLOCKSIZE),
                tar_header(plan.keys[i] + ".cls", len(cls)),
                cls.ljust(tarfile.BLOCKSIZE, b"\0"),
            )
            for part in parts:
                digest.update(part)
                stream.write(part)
                at += len(part)
        else:
            damaged.append((plan.source.title(i), reason))
        job.written[shard] = done + 1
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
        if state.st_mtime_ns != record["mtime_ns"] and sha256_of(tar) != record["sha256"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return record


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
