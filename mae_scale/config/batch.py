"""Numbers that follow from a config and the processes: accumulation, steps, rates, precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mae_scale.config.sections import RunConfig, TrainConfig
from mae_scale.errors import UserError

if TYPE_CHECKING:
    import torch


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Return the micro-batches per optimiser step: global batch / (micro-batch x world size).

    Args:
        train: section `train` of the config.
        world_size: number of processes of the run.

    Raises:
        UserError: the quotient is no whole number; the message names settings that would do.
    """
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (micro * world_size) == 0:
        return batch // (micro * world_size)
    if batch % world_size == 0:
        share = batch // world_size
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        near = min(divisors, key=lambda d: abs(d - micro))
        would = f"train.micro_batch_size {near} would"
    else:
        unit = micro * world_size
        near = max(unit, round(batch / unit) * unit)
        would = f"train.global_batch_size {near} would, or another number of processes"
    raise UserError(
        f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro} x "
        f"{world_size} processes = {micro * world_size}; {would}"
    )


def peak_rate(config: RunConfig) -> float:
    """Return the highest learning rate of a run, by the linear rule (paper section 4)."""
    return config.optim.base_lr * config.train.global_batch_size / 256


def check_schedule(config: RunConfig) -> None:
    """Raise a UserError where warm-up or lowest rate contradict length or peak of the schedule."""
    optim, epochs = config.optim, config.train.epochs
    if optim.warmup_epochs > epochs:
        raise UserError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} is longer than the run, train.epochs "
            f"{epochs}; use at most {epochs}"
        )
    if optim.min_lr > peak_rate(config):
        raise UserError(
            f"optim.min_lr {optim.min_lr:g} is more than the peak learning rate "
            f"{peak_rate(config):g} = optim.base_lr x train.global_batch_size / 256"
        )


def fit_micro_batch(train: TrainConfig, world_size: int) -> None:
    """Lower the micro-batch of a config, in place, until it divides each process's share of images.

    The caller does not call this for a micro-batch that the command line gives. A recipe says how
    many images fit into a GPU; with many processes, each may have fewer images than that. Where
    the global batch does not divide among the processes, nothing is changed: `accumulation_steps`
    then raises the error.

    Args:
        train: section `train` of the config, which is changed.
        world_size: number of processes of the run.
    """
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch < 1 or micro < 1 or batch % world_size or batch % (micro * world_size) == 0:
        return
    share = batch // world_size
    train.micro_batch_size = max(n for n in range(1, micro + 1) if share % n == 0)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32"; `auto` becomes bf16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimiser steps of a run: those of its epochs, or `train.max_steps` if fewer.

    Args:
        train: section `train` of the config.
        steps_per_epoch: optimiser steps of an epoch.
    """
    steps = train.epochs * steps_per_epoch
    return steps if train.max_steps is None else min(steps, train.max_steps)
