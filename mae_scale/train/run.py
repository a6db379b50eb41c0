"""A run from its start to its end: the part that is the same for every task that trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_scale.config.batch import accumulation_steps, resolve_precision, total_steps
from mae_scale.config.deepspeed import check_stage
from mae_scale.config.identity import identity_hash
from mae_scale.config.sections import RunConfig
from mae_scale.data.augment import Augment
from mae_scale.data.bands import Bands
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import STOPPED, UserError
from mae_scale.files import write_atomically
from mae_scale.launch.distributed import on_rank0, process_group, set_collective_timeout
from mae_scale.launch.stopping import catching_signals
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.compiled import compile_blocks
from mae_scale.planning.flops import TrialLoss, count_flops
from mae_scale.planning.gpus import mfu, peak_of
from mae_scale.train import checkpoint
from mae_scale.train.checkpoint import Saver
from mae_scale.train.deepspeed_config import fill_deepspeed_config, fit_buckets, zero_stage
from mae_scale.train.deepspeed_state import layout
from mae_scale.train.determinism import deterministic
from mae_scale.train.ds import DeepSpeedEngine, deepspeed
from mae_scale.train.engine import build_engine, fill_in
from mae_scale.train.evaluation import Pictures, Schedule, Validation
from mae_scale.train.loaders import train_loader
from mae_scale.train.loading import load_checkpoint
from mae_scale.train.loop import Loop, replay
from mae_scale.train.metrics import Record
from mae_scale.train.nonfinite import BadSteps
from mae_scale.train.optimizers import optimizer_order
from mae_scale.train.preflight import ready
from mae_scale.train.profiling import StepProfiler, profiled_steps
from mae_scale.train.records import VALIDATION, read_metrics
from mae_scale.train.run_dir import add_history, note_restart
from mae_scale.train.step import Batch, Stepper
from mae_scale.train.upload import uploads
from mae_scale.world import World

log = logging.getLogger("mae_scale")


@dataclass
class TrainingSetup:
    """Objects that a task makes for training; bad input is found while they are made."""

    task: str
    """Name of the task on the command line."""
    model: nn.Module
    """Model on the meta device, which `train` fills in; it has `set_activation_checkpointing`."""
    shards: ShardSet
    """Shards to train on."""
    loader: TrainLoader
    """Loader of this rank's part of each batch."""
    loss_of: Callable[[DeepSpeedEngine, Batch, int, int], torch.Tensor]
    """Function that returns the loss of a micro-batch, a scalar.

    Its arguments are the engine, the batch, the number of steps done, and the number of the
    micro-batch in the step."""
    trial_loss: TrialLoss
    """Function of the model and images that computes a loss with made-up targets, to count its
    floating-point operations."""
    weights: Callable[[], dict[str, torch.Tensor]] | None = None
    """Function that reads, on rank 0, the weights to start from if there is no checkpoint."""
    validation: Validation | None = None
    """Validation between steps; None: there is none."""
    pictures: Pictures | None = None
    """Pictures between steps; None: there are none."""
    notes: dict[str, str] = field(default_factory=dict)
    """Files to write into the run folder for those who read it later: content by name."""


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """Return the filled-in DeepSpeed config of a run.

    Raises:
        UserError: the config contradicts the recipe, or its stage does not suit the optimiser.
    """
    precision = resolve_precision(config.train.precision, world.device)
    fp32_weights = config.fp32_weights or config.train.autocast
    filled = fill_deepspeed_config(
        config.deepspeed, config.train, world, precision, fp32_weights=fp32_weights
    )
    check_stage(config.optim, zero_stage(filled))
    return filled


def training_data(
    config: RunConfig, world: World, augment: Augment | None = None
) -> tuple[ShardSet, TrainLoader]:
    """Open the training shards, and make the loader of this rank.

    Raises:
        UserError: there are no shards or too few samples, the batch does not divide among the
            ranks, or the augmentation does not suit the bands.
    """
    bands = Bands.of(config)
    for key in ("rand_augment", "color_jitter") if bands.count != 3 else ():
        if value := getattr(config.augment, key, None):
            raise UserError(
                f"augment.{key} {value} changes colours: it takes three bands, not {bands.count} "
                "(model.in_chans); switch it off"
            )
    shards = open_shards(config.data.train, config.data.cache_dir)
    return shards, train_loader(config, world, shards, augment)


def train(config: RunConfig, world: World, ds_config: dict[str, Any], parts: TrainingSetup) -> int:
    """Train to the end or until a signal, from the newest checkpoint if there is one.

    Args:
        config: config of the run.
        world: processes of the run.
        ds_config: filled-in DeepSpeed config.
        parts: objects that the task has made.

    Returns:
        The exit code: 0 if the run is finished, 85 if it was stopped early.
    """
    model, loader = parts.model, parts.loader
    ds_config = fit_buckets(config.deepspeed, ds_config, model, world)
    counts = world.rank == 0 and peak_of(world.device) is not None
    flops = count_flops(model, parts.trial_loss).training if counts else 0
    trace = profiled_steps(config.train)  # raises a UserError for a wrong range
    model.set_activation_checkpointing(  # type: ignore[operator]
        config.train.activation_checkpointing, config.train.activation_offload
    )
    if config.train.compile and config.replay is None:  # a replay looks inside the blocks
        compile_blocks(model)

    run_dir = Path(config.run_dir)
    total = total_steps(config.train, loader.steps_per_epoch)

    schedule = Schedule(loader.steps_per_epoch, config.train.epochs, total)

    def lacks_validation(step: int) -> bool:
        """Return whether the validation of this step is due but was not done before a signal."""
        due = parts.validation is not None and parts.validation.is_due(step, schedule)
        return due and all(row["step"] != step for row in read_metrics(run_dir / VALIDATION))

    writes = config.replay is None
    with (
        deterministic(config.train.deterministic),
        catching_signals() as stop,
        process_group(world, config.train.hang_timeout, stop=stop) as watchdog,
        closing(loader),
        _initial_weights(parts, run_dir, watchdog) as (weights, read_weights),
        ready(config, world, parts.shards.fingerprint, model, watchdog, writes=writes),
    ):
        if config.train.max_hours is not None:
            stop.after(config.train.max_hours)
        run_hash = identity_hash(config)
        watchdog.doing("looking for a checkpoint")
        resume = on_rank0(lambda: _resume_point(config, run_hash, parts.shards.fingerprint))
        if writes:
            on_rank0(lambda: _write(run_dir, parts.notes))
            watchdog.run_dir = run_dir
        step, bad_steps = 0, 0
        if resume is not None:
            commit = checkpoint.Commit.read(resume)
            step, bad_steps = commit.step, commit.bad_steps
        validates_first = on_rank0(lambda: lacks_validation(step))
        if step >= total and writes and not validates_first:
            log.info("%s is finished: %d of %d steps are done", run_dir, step, max(step, total))
            return 0
        if writes:
            on_rank0(lambda: note_restart(run_dir, step))
        watchdog.doing("building the engine")
        if resume is None:
            on_rank0(read_weights)
        fill_in(model, config.seed, ds_config, weights)
        weights.clear()
        order = optimizer_order(model, config.optim)
        engine = build_engine(model, config.optim, ds_config)
        # The time-out is set again, since DeepSpeed has made further groups by now.
        set_collective_timeout(config.train.hang_timeout)
        if resume is not None:
            watchdog.doing(f"loading {resume.name}")
            load_checkpoint(engine, resume, order, watchdog.doing)

        facts = {
            "world_size": world.size,
            "zero_stage": zero_stage(ds_config),
            "precision": resolve_precision(config.train.precision, world.device),
        }
        stepper = Stepper(
            engine=engine,
            loss_of=parts.loss_of,
            world=world,
            watchdog=watchdog,
            stop=stop,
            seed=config.seed,
            train=config.train,
            optim=config.optim,
            steps_per_epoch=loader.steps_per_epoch,
            accumulation=accumulation_steps(config.train, world.size),
        )
        workers = config.data.worker_processes
        if config.replay is not None:
            log.info("going to step %d from step %d, writing nothing", config.replay, step)
            with uploads(loader.batches(step), world.device, workers) as batches:
                found = replay(stepper, engine, batches, step, config.replay)
            log.info("%s", found)
            return 0
        if world.rank == 0:
            event = "started" if resume is None else "resumed"
            length = {"steps_per_epoch": loader.steps_per_epoch, "total_steps": total}
            add_history(
                run_dir, event, step, task=parts.task, **facts, **length, **_platform(world)
            )
        log.info(
            "%s step %d of %d: %s on %d images, %d processes, ZeRO-%d, %s",
            "starting at" if resume is None else f"going on from {resume.name},",
            *(step, total, config.model.name, len(parts.shards), *facts.values()),
        )
        record = None
        if world.rank == 0:
            record = Record(
                run_dir=run_dir,
                step=step,
                total_steps=total,
                steps_per_epoch=loader.steps_per_epoch,
                batch=config.train.global_batch_size,
                log_every=config.train.log_every,
                workers=config.data.worker_processes,
                mfu_of=lambda rate: mfu(flops, rate / world.size, engine.device),
                validates=parts.validation is not None,
            )
        loop = Loop(
            config=config,
            schedule=schedule,
            engine=engine,
            stepper=stepper,
            bad_steps=BadSteps(
                total=bad_steps, most=config.train.max_bad_steps, name_of=loader.name_of
            ),
            watchdog=watchdog,
            stop=stop,
            saver=Saver(engine, run_dir, world, config.checkpoint),
            profiler=StepProfiler(trace, run_dir, world.rank, watchdog),
            record=record,
            commit={
                **facts,
                "config_hash": run_hash,
                "data": parts.shards.fingerprint,
                "layout": layout(engine),
            },
            world_size=world.size,
            validation=parts.validation,
            pictures=parts.pictures,
            step=step,
        )
        with uploads(loader.batches(step), world.device, workers) as batches:
            finished = loop.run(batches, validate_first=validates_first)
        step = loop.step
        if world.rank == 0:
            add_history(run_dir, "finished" if finished else "stopped", step)
        if finished:
            log.info("finished: %d steps; everything is in %s", step, run_dir)
        else:
            reason = stop.reason or "a signal to another rank"
            log.info("stopped by %s after step %d; the same command goes on", reason, step)
        return 0 if finished else STOPPED


def _platform(world: World) -> dict[str, str]:
    """Describe, for the history, the hardware and software that the run uses."""
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else "cpu"
    return {"device": device, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


@contextmanager
def _initial_weights(
    parts: TrainingSetup, run_dir: Path, watchdog: Watchdog
) -> Iterator[tuple[dict[str, torch.Tensor], Callable[[], None]]]:
    """Provide the weights to start from, on rank 0; all ranks call.

    Where nothing has been saved yet the weights are read at once, so that an error in them is found
    before the run folder is made.

    Yields:
        The weights by name, empty unless they were read; and a function for rank 0 that reads them
        into that dictionary if it is empty.
    """
    weights: dict[str, torch.Tensor] = {}

    def read() -> None:
        if parts.weights is not None and not weights:
            weights.update(parts.weights())

    watchdog.doing("reading weights")
    if not on_rank0(lambda: checkpoint.exists(run_dir)):
        on_rank0(read)
    yield weights, read


def _write(run_dir: Path, notes: dict[str, str]) -> None:
    for name, content in notes.items():
        write_atomically(run_dir / name, content)


def _resume_point(config: RunConfig, run_hash: str, data: str) -> Path | None:
    """Find the checkpoint to continue from, and set aside the damaged ones after it.

    A replay continues from the newest one before its step, and sets nothing aside.

    Raises:
        UserError: the checkpoint was trained on other shards, or the run has saved some and none
            can be used.
    """
    run_dir, replay = Path(config.run_dir), config.replay
    before = None if replay is None else replay - 1
    newest = checkpoint.newest_intact(run_dir, run_hash, before)
    if newest is not None and checkpoint.Commit.read(newest).data != data:
        raise UserError(
            f"data.train holds other shards than those {run_dir} was trained on "
            "(its manifest.json differs); use the same ones or another run_dir"
        )
    if replay is None:
        if newest is not None:
            checkpoint.set_aside_newer(run_dir, newest)
        elif config.start_over:
            checkpoint.set_aside_all(run_dir)
        else:
            checkpoint.refuse_lost(run_dir, run_hash)
    return newest
