"""Normalisation in pyramids and heads."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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


class _Counted(_BatchNorm):
    """BatchNorm over all processes; each counts by the number of its values.

    A process may have no values at all, as a mask head has on images without objects. PyTorch's own
    SyncBatchNorm refuses such a process, and tensors on CPUs. With one process the result is that
    of PyTorch's BatchNorm.
    """

    sums = torch.float32
    """Precision in which values are added up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [B, C, ...]; in training all processes must call it together."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values = x.to(self.sums)
        rest = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        own = torch.stack([values.sum(rest), values.square().sum(rest)])
        number = own.new_full((2, 1), x.numel() / self.num_features)
        total: torch.Tensor = _Sum.apply(torch.cat([own, number], dim=1))
        count = total[0, -1].detach()
        mean, square = total[:, :-1] / count.clamp(min=1)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            weight = (self.momentum or 0.1) * (count > 0).float()
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean), weight)  # type: ignore[union-attr]
            self.running_var.lerp_(unbiased.to(self.running_var), weight)  # type: ignore[union-attr]
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight.to(self.sums)
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias.to(self.sums)
        return (values * scale.view(shape) + shift.view(shape)).to(x.dtype)


class CountedBatchNorm(_Counted, nn.BatchNorm2d):
    """BatchNorm of feature maps [B, C, H, W] over all processes."""


class CountedBatchNorm1d(_Counted, nn.BatchNorm1d):
    """BatchNorm of features [B, C] over all processes, whose values are added up in fp64."""

    sums = torch.float64


NORMS: dict[Norm, Any] = {"batch": CountedBatchNorm, "layer": partial(LayerNorm2d, eps=1e-6)}
