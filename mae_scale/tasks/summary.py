"""The lines by which a run describes itself at its start, so that wrong settings are noticed."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from mae_scale.config.batch import accumulation_steps, peak_rate, total_steps
from mae_scale.config.sections import RunConfig
from mae_scale.world import World


def summary(config: RunConfig, world: World, model: nn.Module, steps_per_epoch: int) -> list[str]:
    """Describe a run in lines: model, weights, batch, schedule, validation.

    Args:
        config: config of the run.
        world: this process among the others.
        model: model that is trained; it may be on the meta device.
        steps_per_epoch: optimiser steps of an epoch.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    train = config.train
    accumulation = accumulation_steps(train, world.size)
    total = total_steps(train, steps_per_epoch)
    validation = config.data.val or "none (data.val is null)"
    if config.data.val and getattr(train, "probe_every", 0) is None:
        validation = f"none (train.probe_every is null); pictures are of {config.data.val}"
    return [
        f"model       {config.model.name}, {sum(size for size, _ in sizes):,} parameters, "
        f"{trained:,} of them trained",
        f"weights     {config.weights or 'none: random ones to start from (weights is null)'}",
        f"batch       {train.global_batch_size} = {train.micro_batch_size} x {world.size} ranks x "
        f"{accumulation} accumulated",
        f"schedule    {total:,} steps, {steps_per_epoch:,} an epoch; peak learning rate "
        f"{peak_rate(config):.3g}, {config.optim.warmup}",
        f"validation  {validation}",
    ]


def fitted(state: dict[str, torch.Tensor], taken: dict[str, torch.Tensor], model: nn.Module) -> str:
    """Say which tensors of a model start new, and which of the weights are left out or resized.

    Args:
        state: weights as they were read.
        taken: weights that the model gets.
        model: model that gets them; it may be on the meta device.
    """
    expected = model.state_dict().keys()
    resized = [key for key in taken if key in state and state[key].shape != taken[key].shape]
    lists = {
        "new": [key for key in expected if key not in taken],
        "left out": [key for key in state if key not in taken],
        "resized": resized,
    }
    words = [f"{what} {_grouped(keys)}" for what, keys in lists.items() if keys]
    return "; ".join([f"{len(taken)} of the model's {len(expected)} tensors", *words])


def _grouped(keys: list[str]) -> str:
    """Count keys by the part before their first dot, such as `head (2), norm (2)`."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
