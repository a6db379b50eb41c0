"""Check before the first step, on all ranks: it takes seconds, and one line says what is wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn

import mae_scale
from mae_scale.config.identity import flatten
from mae_scale.config.sections import CheckpointConfig
from mae_scale.errors import CommonError, UserError
from mae_scale.launch.console import size_text
from mae_scale.launch.distributed import gather_to_all, on_rank0
from mae_scale.launch.watchdog import Watchdog
from mae_scale.planning.memory import trained_by
from mae_scale.train.run_dir import abandon, check_run, keep_config, open_run
from mae_scale.world import World, host

log = logging.getLogger("mae_scale")

VISIBLE_S = 10.0  # longest time until every node must see a new file
BESIDE = ("torch", "deepspeed", "timm", "numpy")  # other packages of the same version on all ranks
MAY_DIFFER = ("data.workers",)  # config keys whose value may depend on the node


@contextmanager
def ready(
    config: Any,
    world: World,
    data: str,
    model: nn.Module,
    watchdog: Watchdog,
    *,
    writes: bool = True,
) -> Iterator[None]:
    """Check that all ranks can begin; inside the context rank 0 holds the lock of `config.run_dir`.

    All ranks call. A check that fails leaves no files behind.

    Args:
        config: config of the run.
        world: processes of the run.
        data: fingerprint of the shards.
        model: model whose parameters checkpoints will hold.
        watchdog: watchdog that is told what is being checked.
        writes: whether the run writes into its folder; otherwise the folder is only compared with
            `config`.

    Raises:
        UserError: the ranks differ, see different folders, or the folder is another run's.
        CommonError: the folder cannot be written, or has no room.
    """
    began = time.monotonic()
    watchdog.doing("comparing the ranks")
    _compare(config, world, data, watchdog)
    run_dir = Path(config.run_dir)
    if not writes:
        on_rank0(partial(check_run, run_dir, config))
        yield
        return
    watchdog.doing("checking the run folder")
    lock: list[IO[str]] = []

    def begin() -> str:
        lock.append(open_run(run_dir, config))
        return f".seen-{uuid.uuid4().hex}"

    try:
        try:
            _check_shared(run_dir, on_rank0(begin))
            # The largest possible checkpoint: fp32 weights, and masters beside them.
            size = trained_by(config.optim, model, "fp32").checkpoint_bytes(stage=1)
            on_rank0(partial(_check_room, run_dir, config.checkpoint, size))
            on_rank0(partial(keep_config, run_dir, config))
        except (UserError, CommonError, OSError) as error:  # the same on all ranks
            dist.barrier()
            if lock:
                abandon(run_dir)
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise CommonError(f"run_dir {run_dir} cannot be written: {reason}") from error
            raise
        log.info("preflight took %.1f s", time.monotonic() - began)
        yield
    finally:
        for file in lock:
            file.close()


@dataclass
class _Facts:
    """Facts that a rank knows about itself."""

    host: str
    code: str  # versions, and a hash of the sources
    config: dict[str, Any]  # flat
    data: str
    gpu: str  # name of the GPU's kind; empty: there is none
    gpu_id: str


def _compare(config: Any, world: World, data: str, watchdog: Watchdog) -> None:
    """Raise a `UserError` on all ranks if the facts of one of them differ from those of rank 0."""
    flat = {k: v for k, v in flatten(config.model_dump()).items() if k not in MAY_DIFFER}
    facts = gather_to_all(_Facts(host(), _code(), flat, data, *_gpu(world)))
    first = facts[0]
    for rank, other in enumerate(facts):
        who = f"rank {rank} ({other.host})"
        keys = [key for key in first.config if first.config[key] != other.config.get(key)]
        if keys:
            values = f"{first.config[keys[0]]} -> {other.config.get(keys[0])}"
            raise UserError(f"{who} has another config than rank 0: {keys[0]}: {values}")
        for what, here, there in (
            ("code", first.code, other.code),
            ("data (manifest.json)", first.data, other.data),
            ("GPU", first.gpu or "none", other.gpu or "none"),
        ):
            if here != there:
                raise UserError(f"{who} has another {what} than rank 0: {here} -> {there}")
    places = Counter((f.host, f.gpu_id) for f in facts if f.gpu_id)
    for (place, gpu), ranks in places.items():
        if ranks > 1:
            raise UserError(f"{ranks} ranks on {place} share the GPU {gpu}; one task per GPU")
    if first.gpu and world.size > 1:
        watchdog.doing("trying NCCL")
        one = torch.ones(1, device=world.device)
        dist.all_reduce(one)
        _check_sums(
            [(f.host, total) for f, total in zip(facts, gather_to_all(one.item()), strict=True)]
        )
    hosts = Counter(f.host for f in facts)
    log.info(
        "preflight: %d ranks on %s; %s; %s",
        *(world.size, _in_words(hosts), first.gpu or "CPU", first.code),
    )


def _check_sums(sums: list[tuple[str, float]]) -> None:
    """Raise a `CommonError` unless each rank has summed a one of every rank.

    Args:
        sums: host and sum of each rank, in rank order.
    """
    wrong = [(rank, *found) for rank, found in enumerate(sums) if found[1] != len(sums)]
    if wrong:
        rank, _, total = wrong[0]
        raise CommonError(
            f"NCCL sums wrongly on {_in_words(Counter(place for _, place, _ in wrong))}: rank "
            f"{rank} has {total:g} instead of {len(sums)}; leave these hosts out (--exclude)"
        )


def _in_words(hosts: Counter[str]) -> str:
    names = [f"{name} ({ranks})" for name, ranks in hosts.items()]
    return ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")


def _code() -> str:
    """Return versions, and the start of a SHA-256 over the sources of this package."""
    folder, digest = Path(mae_scale.__file__).parent, hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".json", ".yaml")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in BESIDE]
    own = f"mae-scale {mae_scale.__version__} (sources {digest.hexdigest()[:8]})"
    return ", ".join([own, *versions])


def _gpu(world: World) -> tuple[str, str]:
    """Return kind and identity of this rank's GPU; both are empty if there is none."""
    if world.device.type != "cuda":
        return "", ""
    here = torch.cuda.device_count()
    if world.device.index >= here:
        return f"only {here} for {world.local_size} ranks", ""
    properties = torch.cuda.get_device_properties(world.device)
    return properties.name, str(getattr(properties, "uuid", world.device.index))


def _check_shared(run_dir: Path, token: str) -> None:
    """Raise on all ranks unless each sees a file of rank 0, and rank 0 sees one of each rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = run_dir / f"{token}-{rank}"
    try:
        on_rank0(own.touch)
        wrong = None
        if rank > 0:
            wrong = _answer(own, run_dir / f"{token}-0")
        found = gather_to_all((host(), wrong))
        answers = [run_dir / f"{token}-{number}" for number in range(size)]
        for number, (place, problem) in enumerate(found):
            if problem is not None:
                raise UserError(f"run_dir {run_dir}: rank {number} ({place}) {problem}")
        unseen = on_rank0(lambda: [n for n, path in enumerate(answers) if not _appears(path)])
        if unseen:
            place = found[unseen[0]][0]
            raise UserError(
                f"run_dir {run_dir}: rank 0 ({found[0][0]}) does not see the file that rank "
                f"{unseen[0]} ({place}) has made there; it must be a shared folder"
            )
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _answer(own: Path, token: Path) -> str | None:
    if not _appears(token):
        return "does not see the file that rank 0 has made there; it must be a shared folder"
    try:
        own.touch()
    except OSError as error:
        return f"cannot write: {error.strerror}"
    return None


def _appears(path: Path) -> bool:
    end = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            list(path.parent.iterdir())  # makes NFS look again
        time.sleep(0.2)
    return True


def _check_room(run_dir: Path, config: CheckpointConfig, size: int) -> None:
    """Raise a `CommonError` unless there is room for all checkpoints that will exist at a time."""
    there = len(list((run_dir / "checkpoints").glob("step-*/COMMITTED.json")))
    number = max(1, config.keep + 1 - there)
    free = shutil.disk_usage(run_dir).free
    if free < number * size:
        raise CommonError(
            f"not enough room in {run_dir}: {number} more checkpoints of about {size_text(size)} "
            f"(checkpoint.keep {config.keep} and the one being written), {size_text(free)} are free"
        )
    log.info("run_dir has %s free; a checkpoint takes up to %s", *map(size_text, (free, size)))
