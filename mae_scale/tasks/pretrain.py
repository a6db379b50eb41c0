"""`mae-scale pretrain`: train a masked autoencoder (paper section 3, Table 8)."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import torch

from mae_scale.config import PretrainConfig, identity_hash, parse
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import normalize
from mae_scale.errors import UserError
from mae_scale.models import build_mae
from mae_scale.models.flops import training_flops
from mae_scale.models.masking import mask_noise
from mae_scale.train import checkpoint
from mae_scale.train.distributed import World, be_patient, on_rank0, process_group
from mae_scale.train.engine import (
    accumulation_steps,
    build_engine,
    compile_blocks,
    fill_deepspeed_config,
    fill_in,
    optimizer_order,
    resolve_precision,
    zero_stage,
)
from mae_scale.train.logs import set_up_logging
from mae_scale.train.loop import Batch, Loop, total_steps
from mae_scale.train.preflight import ready
from mae_scale.train.run_dir import add_history, note_restart
from mae_scale.train.stopping import STOPPED, stop_request
from mae_scale.train.watchdog import watchdog

log = logging.getLogger("mae_scale")


def main(argv: list[str], prog: str) -> int:
    """Parse the config, train, and give the exit code: 0 finished, 85 stopped early."""
    config = parse(PretrainConfig, argv, prog)
    world = World.from_environment()
    set_up_logging(world)
    return pretrain(config, world)


def pretrain(config: PretrainConfig, world: World) -> int:
    """Train until the end or a signal. What can be wrong is looked at before anything is made."""
    precision = resolve_precision(config.train.precision, world.device)
    ds_config = fill_deepspeed_config(config.deepspeed, config.train, world, precision)
    shards = open_shards(config.data.train, config.data.cache_dir)
    loader = TrainLoader(
        shards,
        img_size=config.model.img_size,
        seed=config.seed,
        lanes=config.data.lanes,
        window=config.data.window,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        pin_memory=world.device.type == "cuda",
        cache_dir=config.data.cache_dir,
        cache_bytes=int(config.data.cache_gb * 1e9),
        max_bad_fraction=config.data.max_bad_fraction,
    )
    with torch.device("meta"):  # no weights yet
        model = build_mae(**config.model.build_kwargs())
    model.set_activation_checkpointing(
        config.train.activation_checkpointing, config.train.activation_offload
    )
    if config.train.compile and config.replay is None:  # a replay looks inside the blocks
        compile_blocks(model)

    run_dir = Path(config.run_dir)
    total = total_steps(config.train, loader.steps_per_epoch)
    with (
        process_group(world, config.train.hang_timeout),
        closing(loader),
        ready(config, world, shards.fingerprint, model, writes=config.replay is None),
    ):
        run_hash = identity_hash(config)
        watchdog.doing("looking for a checkpoint")
        resume = on_rank0(lambda: _resume_point(config, run_hash, shards.fingerprint))
        step, bad_steps = 0, 0
        if resume is not None:
            commit = checkpoint.Commit.read(resume)
            step, bad_steps = commit.step, commit.bad_steps
        if step >= total and config.replay is None:
            log.info("%s is finished: %d of %d steps are done", run_dir, step, total)
            return 0
        if config.replay is None:
            on_rank0(lambda: note_restart(run_dir, step))
        watchdog.doing("building the engine")
        fill_in(model, config.seed, ds_config)
        order = optimizer_order(model, config.optim)
        engine = build_engine(model, config.optim, ds_config)
        be_patient(config.train.hang_timeout)  # also those groups that DeepSpeed has made
        if resume is not None:
            watchdog.doing(f"loading {resume.name}")
            checkpoint.load(engine, resume, order)

        def loss_of(batch: Batch) -> torch.Tensor:
            image, epoch, sample = batch["image"], batch["epoch"], batch["sample"]
            noise = mask_noise(config.seed, epoch, sample, model.num_patches)
            loss, _, _ = engine(normalize(image), noise)
            return loss

        facts = {
            "world_size": world.size,
            "zero_stage": zero_stage(ds_config),
            "precision": precision,
        }
        loop = Loop(
            engine=engine,
            loss_of=loss_of,
            world=world,
            run_dir=run_dir,
            seed=config.seed,
            train=config.train,
            optim=config.optim,
            checkpoint=config.checkpoint,
            steps_per_epoch=loader.steps_per_epoch,
            accumulation=accumulation_steps(config.train, world.size),
            commit={**facts, "config_hash": run_hash, "data": shards.fingerprint},
            flops_per_image=training_flops(model),
            data_workers=config.data.workers,
            name_of=loader.name_of,
            bad_steps=bad_steps,
        )
        if config.replay is not None:
            log.info("going to step %d from step %d, writing nothing", config.replay, step)
            found = loop.replay(loader.batches(step), step, config.replay)
            log.info("%s", found)
            return 0
        if world.rank == 0:
            add_history(run_dir, "started" if resume is None else "resumed", step, **facts)
        log.info(
            "%s step %d of %d: %s on %d images, %d processes, ZeRO-%d, %s",
            "starting at" if resume is None else f"going on from {resume.name},",
            *(step, total, config.model.name, len(shards), *facts.values()),
        )
        step, finished = loop.run(loader.batches(step), step)
        if world.rank == 0:
            add_history(run_dir, "finished" if finished else "stopped", step)
        if finished:
            log.info("finished: %d steps; everything is in %s", step, run_dir)
        else:
            reason = stop_request.reason or "a signal to another rank"
            log.info("stopped by %s after step %d; the same command goes on", reason, step)
        return 0 if finished else STOPPED


def _resume_point(config: PretrainConfig, run_hash: str, data: str) -> Path | None:
    """The checkpoint to go on from; damaged ones after it no longer count.

    Raises:
        UserError: the checkpoint was trained on other shards.
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
        checkpoint.discard_newer(run_dir, newest)
    return newest
