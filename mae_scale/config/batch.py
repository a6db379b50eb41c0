"""Accumulation, steps, rates and precision, as they follow from a config and the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mae_scale.config.sections import RunConfig, TrainConfig
from mae_scale.errors import UserError

if TYPE_CHECKING:
    import torch


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimiser step: global batch / (micro-batch x world size).

    Raises:
        UserError: it is no whole number; the message says which settings would do.
    """
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch < 1 or micro < 1:
        raise UserError(
            f"train.global_batch_size {batch} and train.micro_batch_size {micro} must be positive"
        )
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
    """Highest learning rate of a run, by the linear rule (paper section 4)."""
    return config.optim.base_lr * config.train.global_batch_size / 256


def check_schedule(config: RunConfig) -> None:
    """Raise a UserError where the learning rate could not follow its rule."""
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
    """Lower a micro-batch that nobody asked for on the command line until it divides the batch.

    A recipe says what fits into a GPU; with many processes each may have fewer images than that.
    A batch that does not divide among the processes stays as it is: `accumulation_steps` says so.
    """
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch < 1 or micro < 1 or batch % world_size or batch % (micro * world_size) == 0:
        return
    share = batch // world_size
    train.micro_batch_size = max(n for n in range(1, micro + 1) if share % n == 0)


def resolve_precision(precision: str, device: torch.device) -> str:
    """bf16 or fp32; `auto` is bf16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a run: those of its epochs, or `train.max_steps` if that is less."""
    steps = train.epochs * steps_per_epoch
    return steps if train.max_steps is None else min(steps, train.max_steps)
