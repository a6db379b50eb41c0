"""The learning-rate rule of MAE (paper Table 8)."""

from __future__ import annotations

import math


def learning_rate(
    epoch: float, *, peak: float, floor: float, warmup: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine to `floor`.

    Args:
        epoch: optimiser steps done / steps per epoch.
        peak: base learning rate x global batch size / 256.
        floor: value at the end of the last epoch.
        warmup: epochs of warm-up.
        epochs: epochs of the whole schedule.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / (epochs - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
