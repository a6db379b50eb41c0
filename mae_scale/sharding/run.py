"""Writing shards in parallel, with the same bytes every time, and going on after interruptions.

Until all shards are finished, the folder has a subfolder ``.sharding`` with the plan, a record of
each finished shard, and the unfinished shards. A tar gets its name only when it is whole, its
record follows, and the manifest comes last. No step needs a lock: two runs of one plan write the
same bytes.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mae_scale.data.remote import printable
from mae_scale.data.shards import (
    ANNOTATED_DTYPE,
    INDEX_DTYPE,
    MANIFEST,
    Shard,
    dump,
    read_manifest,
    write_shard_set,
)
from mae_scale.errors import STOPPED, UserError
from mae_scale.files import host_label, owner, read_file, sha256_of, write_atomically
from mae_scale.launch.console import say, size_text, warn
from mae_scale.sharding.ade import find_ade
from mae_scale.sharding.annotated import AnnotatedSource
from mae_scale.sharding.coco import find_coco
from mae_scale.sharding.plan import OPTIONAL, Options, Plan
from mae_scale.sharding.processes import run_all
from mae_scale.sharding.sources import Choice, Source, find_source
from mae_scale.sharding.writer import (
    WORK,
    Job,
    ShardingError,
    read_record,
    write_shard,
)

_STALE_SECONDS = 3600.0


def shard(
    src: str | Path,
    out: str | Path,
    options: Options,
    *,
    workers: int = 1,
    num_tasks: int = 1,
    task_index: int = 0,
    dry_run: bool = False,
    find: Callable[[Path, str, int], Source] | None = None,
    choice: Choice | None = None,
) -> int:
    """Write the images of one split of `src` as shards into the folder `out`.

    Args:
        workers: number of writer processes, which does not change the result.
        num_tasks, task_index: write only every `num_tasks`-th shard, from `task_index` on.
        dry_run: whether to print what would be written, and write nothing.
        find: function of folder, split and workers that lists the images in `src`; None: the
            layout is found by looking.
        choice: images to take, and their classes; None: all images, classes by looking.

    Returns:
        Exit code: 0 if done, STOPPED after a signal.

    Raises:
        UserError: the input is bad; nothing has been written.
        ShardingError: the disk is full, or a file could not be read or written.
    """
    src, out = Path(src), Path(out)
    try:
        with _signals_interrupt():
            _check_places(src, out)
            new = not out.exists()
            try:
                if src.is_dir():
                    say(f"listing the images of {src}")
                if find is not None:
                    source = find(src, options.split, workers)
                else:
                    source = _find(src, options.split, workers, choice, out / WORK)
            except OSError as error:
                _remove_unpacked(out, new)
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise ShardingError(f"no room in {out}: {error.strerror}") from error
                raise UserError(f"{src} cannot be read: {error}") from error
            except BaseException:
                _remove_unpacked(out, new)
                raise
            if source.taken:
                say(source.taken)
            for warning in source.warnings:
                warn(f"warning: {printable(warning)}")
            plan = Plan(source, options)
            try:
                if dry_run:
                    _describe(plan, out)
                else:
                    _run(plan, out, workers, num_tasks, task_index)
            finally:
                _remove_unpacked(out, new)
    except OSError as error:
        raise ShardingError(f"{out} cannot be written: {error}") from error
    except KeyboardInterrupt:
        warn("stopped; the same command goes on from here")
        return STOPPED
    return 0


def _find(src: Path, split: str, workers: int, choice: Choice | None, work: Path) -> Source:
    if choice is None or choice == Choice():
        for find in (find_coco, find_ade):
            if src.is_dir() and (source := find(src, split, workers)) is not None:
                return source
    return find_source(src, split, workers, choice, work)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does; ignore a second signal."""

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_unpacked(out: Path, new: bool) -> None:
    """Remove the images that this process has unpacked, and the folders if they are empty."""
    unpacked = out / WORK / f"unpacked.{owner()}.tmp"
    if unpacked.exists():
        with suppress(OSError):
            unpacked.unlink()
            unpacked.parent.rmdir()
            if new:
                out.rmdir()


def _check_places(src: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; give a new or empty folder for the shards")
    if src.is_dir() and out.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{out} lies inside the source {src}; give a folder outside of it")
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written: no permission in {parent}")


def _run(plan: Plan, out: Path, workers: int, num_tasks: int, task_index: int) -> None:
    if _check_plan(plan, out) is None:
        try:
            _write_mine(plan, out, workers, range(task_index, len(plan), num_tasks))
            records = [read_record(out, plan, i) for i in range(len(plan))]
            there = [record for record in records if record is not None]
            if len(there) == len(plan):
                _finish(plan, out, there)
                return
            if num_tasks > 1 and not (out / MANIFEST).exists():
                say(
                    f"task {task_index} of {num_tasks} is done, {len(there):,} of {len(plan):,} "
                    "shards are there; the last task writes the manifest"
                )
                return
        except (ShardingError, FileNotFoundError):
            # Another run or task may have finished all shards, and removed the work folder.
            if not (out / MANIFEST).exists():
                raise
    manifest = _check_plan(plan, out)
    if manifest is None:
        raise ShardingError(f"shards in {out} were changed by somebody else")
    _finish_again(plan, out, manifest, workers)


def _write_mine(plan: Plan, out: Path, workers: int, mine: range) -> None:
    todo = []
    for i in mine:
        record = read_record(out, plan, i)
        if record is None:
            todo.append(i)
        else:
            _report(record)
    _check_room(plan, out, todo)
    out.mkdir(parents=True, exist_ok=True)
    _start_work(plan, out)
    if len(todo) < len(mine):
        say(f"going on: {len(mine) - len(todo):,} of {len(mine):,} shards are there")
    _write(plan, out, todo, workers)


def _check_plan(plan: Plan, out: Path) -> dict[str, Any] | None:
    """Return the manifest if the folder is finished, otherwise None.

    Raises:
        UserError: the folder belongs to another plan, or holds other tars.
    """
    manifest: dict[str, Any] | None = None
    try:
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            before = manifest["made_by"].get("plan")
        elif (out / WORK / "plan.json").exists():
            before = dict(json.loads(read_file(out / WORK / "plan.json")))
        elif any(out.glob("*.tar")):
            before = None
        else:
            return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{out} holds a damaged plan; give a new folder") from error
    if before is None:
        raise UserError(f"{out} holds tars of something else; give a new or empty folder")
    keys = [*plan.record, *(key for key in OPTIONAL if key not in plan.record)]
    different = [
        f"{key} {before.get(key)} there, {plan.record.get(key)} now"
        for key in keys
        if before.get(key) != plan.record.get(key)
    ]
    if different:
        raise UserError(
            f"{out} was made with other options or another source ({'; '.join(different)}); "
            "give another folder, or the same options"
        )
    return manifest


def _start_work(plan: Plan, out: Path) -> None:
    """Write the plan, and remove the unfinished files of runs that have ended."""
    work = out / WORK
    work.mkdir(exist_ok=True)
    mine = work / f"plan.{owner()}"
    write_atomically(mine, dump(plan.record))
    try:
        os.link(mine, work / "plan.json")  # the first of several tasks writes it
    except FileExistsError:
        pass
    except OSError:  # the file system has no hard links
        if not (work / "plan.json").exists():
            shutil.copyfile(mine, work / "plan.json")
    mine.unlink()
    _check_plan(plan, out)
    _remove_unfinished(out)


def _remove_unfinished(out: Path) -> None:
    """Remove the temporary files of processes that have ended."""
    for path in [*(out / WORK).glob("*.tmp"), *out.glob(".*.tmp")]:
        match = re.fullmatch(rf".*\.{host_label()}-(\d+)\.tmp", path.name)
        with suppress(OSError):
            gone = match is not None and not _alive(int(match[1]))
            if gone or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _check_room(plan: Plan, out: Path, todo: list[int]) -> None:
    need, free = sum(plan.bytes(i) for i in todo), _free(out)
    if need > free:
        raise ShardingError(
            f"not enough room for {out}: {len(todo):,} shards need {size_text(need)}, "
            f"{size_text(free)} are free"
        )


def _free(out: Path) -> int:
    return shutil.disk_usage(next(p for p in [out, *out.absolute().parents] if p.exists())).free


def _write(plan: Plan, out: Path, todo: list[int], workers: int) -> None:
    job = Job(plan, out, multiprocessing.RawArray("q", len(plan)))
    total = sum(len(plan.images(i)) for i in todo)
    try:
        with closing(run_all(write_shard, todo, workers, job, job.written, total)) as records:
            for record in records:
                _report(record)
    finally:
        _remove_unfinished(out)


def _report(record: dict[str, Any]) -> None:
    for name, reason in record["damaged"]:
        warn(f"damaged, left out: {printable(name)}: {printable(reason)}")


def _finish(plan: Plan, out: Path, records: list[dict[str, Any]]) -> None:
    """Write the manifest and the other files beside the tars, then remove the work folder."""
    damaged = sorted(item for record in records for item in record["damaged"])
    full = [record for record in records if record["samples"]]
    if not full:
        shutil.rmtree(out / WORK)
        with suppress(OSError):
            out.rmdir()
        raise UserError(f"none of the {len(plan.source):,} images can be decoded")
    annotated = isinstance(plan.source, AnnotatedSource)
    dtype = ANNOTATED_DTYPE if annotated else INDEX_DTYPE
    index = np.array([tuple(e) for r in full for e in r["index"]], dtype)
    checksums = np.concatenate([np.array(r["checksums"], np.uint32) for r in full])
    shards = [Shard(r["file"], r["samples"], r["bytes"], r["sha256"]) for r in full]
    classes, split = plan.source.classes, plan.options.split
    made_by: dict[str, Any] = {"plan": plan.record, "damaged": damaged}
    annotations = plan.source.manifest if isinstance(plan.source, AnnotatedSource) else None
    write_shard_set(out, split, classes, shards, index, checksums, made_by, annotations)
    _clean(out)
    say(
        f"{out}: {len(index):,} images of {len(classes):,} classes in {len(shards):,} shards, "
        f"{size_text(sum(shard.bytes for shard in shards))}; "
        f"{len(damaged):,} damaged images left out"
    )


def _clean(out: Path) -> None:
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in out.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def _finish_again(plan: Plan, out: Path, manifest: dict[str, Any], workers: int) -> None:
    """Report that a folder is finished; write again shards that have been lost since."""
    number = {plan.file(i): i for i in range(len(plan))}
    lost = {}
    for entry in manifest["shards"]:
        tar = out / entry["file"]
        if not tar.exists() or tar.stat().st_size != entry["bytes"]:
            warn(f"{entry['file']} is missing or of another size; it is written again")
            lost[entry["file"]] = entry["sha256"]
    if lost:
        todo = [number[file] for file in lost]
        _check_room(plan, out, todo)
        _start_work(plan, out)
        _write(plan, out, todo, workers)
        for file, sha256 in lost.items():
            if sha256_of(out / file) != sha256:
                (out / file).unlink()
                raise ShardingError(f"{out}: the source has changed since {file} was written")
    _clean(out)
    say(
        f"{out} is complete: {manifest['num_samples']:,} images in "
        f"{len(manifest['shards']):,} shards, "
        f"{len(manifest['made_by']['damaged']):,} damaged images left out"
    )


def _describe(plan: Plan, out: Path) -> None:
    source = plan.source
    need = sum(plan.bytes(i) for i in range(len(plan)))
    per_shard = np.diff(plan.bounds)
    about = "about " if plan.options.resize_short else ""
    say(f"source: {source.kind} {source.root}")
    say(
        f"images: {len(source):,} in {len(source.classes):,} classes, "
        f"{size_text(int(source.sizes.sum()))}"
    )
    say(
        f"shards: {len(plan):,} of {per_shard.min():,} to {per_shard.max():,} images, "
        f"{about}{size_text(need)} in all"
    )
    say(f"free space: {size_text(_free(out))}" + ("" if need < _free(out) else " (not enough)"))
