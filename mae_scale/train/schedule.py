"""Learning-rate rules: that of MAE (paper Table 8), and those of detection and segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from mae_scale.config.sections import OptimizerConfig, TrainConfig

Curve = Literal["cosine", "linear", "steps"]


def rate_of(optim: OptimizerConfig, train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a run for the step that follows `step` steps."""
    peak = optim.base_lr * train.global_batch_size / 256
    if optim.curve is None:
        return learning_rate(
            step / steps_per_epoch,
            peak=peak,
            floor=optim.min_lr,
            warmup=optim.warmup_epochs,
            epochs=train.epochs,
        )
    keys: Any = optim
    warmup = keys.warmup_steps
    return curve_rate(
        step,
        train.epochs * steps_per_epoch,
        peak=peak,
        floor=optim.min_lr,
        curve=keys.schedule,
        warmup_steps=optim.warmup_epochs * steps_per_epoch if warmup is None else warmup,
        warmup_factor=keys.warmup_factor,
        drops=keys.drops,
    )


def learning_rate(
    epoch: float, *, peak: float, floor: float, warmup: float, epochs: float
) -> float:
    """Return the rate at a fractional epoch: linear warm-up from 0, then half a cosine to `floor`.

    Args:
        epoch: optimiser steps done / steps per epoch.
        peak: base learning rate x global batch size / 256.
        floor: learning rate at the end of the last epoch.
        warmup: number of epochs of warm-up.
        epochs: number of epochs of the whole schedule, warm-up included.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / (epochs - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def curve_rate(
    step: int,
    steps: int,
    *,
    peak: float,
    floor: float,
    curve: Curve,
    warmup_steps: float,
    warmup_factor: float,
    drops: Sequence[float] = (),
) -> float:
    """Return the learning rate: a curve over the whole run, multiplied by a warm-up factor.

    Detectron2 and MMSegmentation do it this way: the curve begins at step 0, together with the
    warm-up, and not after it as in `learning_rate`.

    Args:
        step: number of optimiser steps done.
        steps: number of steps of the whole schedule.
        peak: value at which the curve begins.
        floor: value at which "cosine" and "linear" end; "steps" does not use it.
        curve: "cosine", half a period; "linear"; or "steps", a tenth from each of `drops` on.
        warmup_steps: number of steps over which the warm-up factor rises linearly to 1.
        warmup_factor: warm-up factor at step 0.
        drops: moments at which "steps" drops, as shares of the run from 0 to 1.
    """
    progress = min(1.0, step / steps)
    if curve == "steps":
        rate = peak * 0.1 ** sum(progress >= drop for drop in drops)
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * progress)) if curve == "cosine" else 1 - progress
        rate = floor + (peak - floor) * left
    if step < warmup_steps:
        rate *= warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return rate
