"""Normalisation of feature maps in pyramids and heads."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import LayerNorm2d
from torch import nn

Norm = Literal["batch", "layer"]


class _Sum(torch.autograd.Function):
    """Sum a tensor over all processes, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class CountedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over all processes; each counts by the number of its values.

    A process may have no values at all, as a mask head has on images without objects. PyTorch's own
    SyncBatchNorm refuses such a process, and tensors on CPUs. With one process the result is that
    of BatchNorm2d.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [B, C, H, W]; in training all processes must call it together."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values = x.float()
        own = torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        number = own.new_full((2, 1), x.numel() / self.num_features)
        total: torch.Tensor = _Sum.apply(torch.cat([own, number], dim=1))
        count = total[0, -1].detach()
        mean, square = total[:, :-1] / count.clamp(min=1)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            weight = (self.momentum or 0.1) * (count > 0)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean), weight)  # type: ignore[union-attr]
            self.running_var.lerp_(unbiased.to(self.running_var), weight)  # type: ignore[union-attr]
        scale = self.weight.float() * (var + self.eps).rsqrt()
        shift = self.bias.float() - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


NORMS: dict[Norm, Any] = {"batch": CountedBatchNorm, "layer": partial(LayerNorm2d, eps=1e-6)}
