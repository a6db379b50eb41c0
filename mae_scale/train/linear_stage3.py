"""Linear layers under ZeRO 3, whose backward pass keeps no gathered weights.

PyTorch's own keep a view of the weights, and so their memory, until the backward pass. DeepSpeed
replaces them by some that keep the parameter instead, and find in it what has been gathered again.
These here do the same with less work: the bias is added within the matrix product, as in PyTorch,
not by an operator that rounds a second time, and the host does less for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mae_scale.train.ds import partition_parameters

PYTORCHS = nn.functional.linear
NOT_AVAILABLE = partition_parameters.ZeroParamStatus.NOT_AVAILABLE


class Linear(torch.autograd.Function):
    """x [..., in] times weight [out, in] transposed, plus bias [out] or None: [..., out]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        kind = x.device.type
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return torch._C._nn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.autocast is None:
            return _gradients(ctx, grad)
        with torch.autocast(grad.device.type, ctx.autocast):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    partitioned = getattr(weight, "ds_status", None) is NOT_AVAILABLE
    if partitioned:
        weight.all_gather()
    try:
        return (
            grad.matmul(weight) if of_x else None,
            rows.t().matmul(x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
    finally:
        if partitioned:
            weight.partition()


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Take the place of `torch.nn.functional.linear`, with its names of arguments."""
    return Linear.apply(input, weight, bias)


def use_linear(stage: int) -> None:
    """Let all modules of this process compute with the linear layers that fit a ZeRO stage.

    DeepSpeed leaves its own in place when a run under ZeRO 3 ends, for later runs, too.
    """
    if stage == 3:
        nn.functional.linear = linear
    elif nn.functional.linear is linear:
        nn.functional.linear = PYTORCHS


# DeepSpeed puts this function into `torch.nn.functional` when it cuts the first weights.
partition_parameters.zero3_linear_wrap = linear
