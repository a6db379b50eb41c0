"""Optimisers: AdamW with layer-wise decay, LARS, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from mae_scale.config.sections import OptimizerConfig
from mae_scale.models.kinds import parameter_kinds
from mae_scale.train.deepspeed_state import inner_optimizer, masters
from mae_scale.train.ds import DeepSpeedEngine

EMA = "ema"  # key of the average in the optimiser's state of a parameter


def optimizer_groups(model: nn.Module, optim: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by weight decay and, under layer-wise decay, by layer.

    The kinds in `optim.kinds_without_decay` have no weight decay. A group's `lr_scale` multiplies
    the learning rate: under layer-wise decay it is `rate_per_layer ** (last layer - layer)` (paper
    Table 9), with the layers of `model.layer_of`.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    kinds = parameter_kinds(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = kinds[name] not in optim.kinds_without_decay
        layer, scale = 0, 1.0
        if optim.rate_per_layer != 1:
            layer, last = model.layer_of(name), model.layer_of("head")  # type: ignore[operator]
            scale = optim.rate_per_layer ** (last - layer)
        new = {
            "params": [],
            "weight_decay": optim.weight_decay if decays else 0.0,
            "lr_scale": scale,
        }
        groups.setdefault((layer, decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def optimizer_order(model: nn.Module, optim: OptimizerConfig) -> list[str]:
    """List the names of the trained parameters in the order of the optimiser's groups."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer_groups(model, optim)
    return [name_of[id(parameter)] for group in groups for parameter in group["params"]]


def make_optimizer(model: nn.Module, optim: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimiser of a run; `step.Stepper` sets the learning rate at each step."""
    return OPTIMIZERS[optim.optimizer](optimizer_groups(model, optim), optim)


class GuardedLars(Lars):
    """timm's LARS, which adapts and decays only tensors of more than one dimension.

    The decay joins the gradient g before its norm is taken, as in the authors' code: the step is
    divided by |g + decay w|, where timm's own divides by |g| + decay |w|.

    Like fused AdamW it changes nothing where the scalar `found_inf` is 1.

    Args:
        groups: groups of `optimizer_groups`, each with a weight decay of its own.
        momentum: factor of the momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        for group in groups:
            group["always_adapt"] = all(p.ndim > 1 for p in group["params"])
            group["foreach"] = False  # of the group, since timm's before 1.0.31 take no argument
        super().__init__(groups, lr=0.0, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step once; all gradients must be there. Works on the device without waiting for it."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        tensors = [t for p in parameters for t in (p, self.state[p]["momentum_buffer"])]
        before = [tensor.clone() for tensor in tensors]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for parameter in group["params"] if decay else ():
                parameter.grad.add_(parameter, alpha=decay)
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            after = [t for p in parameters for t in (p, self.state[p]["momentum_buffer"])]
            for tensor, old in zip(after, before, strict=True):
                tensor.copy_(torch.where(found_inf > 0, old, tensor))


# Functions that make an optimiser from parameter groups and its config, by
# `OptimizerConfig.optimizer`.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups, optim: torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True),
    "lars": lambda groups, optim: GuardedLars(groups, optim.momentum),
}


def keep_moving_average(engine: DeepSpeedEngine, decay: float) -> None:
    """Let the optimiser keep a moving average of the fp32 weights (paper Table 11).

    The average is one more state of the optimiser beside AdamW's moments. So each rank keeps it in
    fp32 for the masters that it steps on, whatever the ZeRO stage and without communication, and it
    is saved, loaded and converted to other world sizes together with the moments.

    Args:
        engine: engine whose optimiser is AdamW.
        decay: share of the average that stays at each step, 0 to 1.
    """
    inner = inner_optimizer(engine)
    for master in masters(engine):
        state = inner.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
        state[EMA] = master.detach().clone()

    @torch.no_grad()
    def update(optimizer: Any, args: Any, kwargs: Any) -> None:
        weight = 1 - decay
        if getattr(optimizer, "found_inf", None) is not None:  # the step may not have been applied
            weight = weight * (1 - optimizer.found_inf)
        for group in optimizer.param_groups:
            for master in group["params"]:
                optimizer.state[master][EMA].lerp_(master, weight)

    inner.register_step_post_hook(update)
