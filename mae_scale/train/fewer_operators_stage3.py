"""ZeRO 3 with fewer operators and less Python: the counterpart of `fewer_operators`.

Every number has the bits that DeepSpeed computes. Gradients are copied and measured for many
parameters at once. Four things of DeepSpeed's are left out: listing a module's parameters anew at
each fetch and release, marking ranges for NVIDIA's profiler (see `ds`), counting hooks, and asking
the device whether the norm is finite, which `nonfinite.StepGuard` decides on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mae_scale.train.ds import DeepSpeedZeroOptimizer_Stage3, deepspeed, stage3_modules
from mae_scale.train.fewer_operators import norms_of

dist = deepspeed.comm


def use_fewer_operators_at_stage_3(optimizer: Any) -> None:
    """Let a ZeRO optimiser of stage 3 handle many parameters at once, if that is possible."""
    if not (optimizer.zenflow or optimizer.model_parallel_rank):
        optimizer.__class__ = FewerOperatorsStage3


class FewerOperatorsStage3(DeepSpeedZeroOptimizer_Stage3):
    """The optimiser of ZeRO 3, with fewer operators and less Python."""

    reduce_and_partition_stream: Any  # None on a device without streams, such as a CPU

    def should_refresh_expected_hook_count(self) -> bool:
        """Return False: only callers of `loss.backward()` itself need the count of hooks."""
        return False

    def independent_gradient_partition_epilogue(self) -> None:
        """Send the last bucket; later work on the device waits for it, and the host does not."""
        stream = self.reduce_and_partition_stream
        if stream is None or self.offload_optimizer:
            super().independent_gradient_partition_epilogue()
            return
        for dtype in sorted(self.ipg_buckets, key=str):  # in the same order on all ranks
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        self.reduce_and_partition_stream = _WaitingOnTheDevice(stream)
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.reduce_and_partition_stream = stream

    @torch.no_grad()
    def partition_grads(
        self, params_to_release: list[Any], grad_partitions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Add this rank's share of a bucket's gradients to the sums, and return these.

        The first micro-batch of a step overwrites the sums.
        """
        if self.offload_optimizer:
            return super().partition_grads(params_to_release, grad_partitions)
        sums = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        mine, shares = [], []
        for param, grad in zip(params_to_release, grad_partitions, strict=True):
            if param.partition_numel() * self._get_param_partition_rank(param) < param.ds_numel:
                mine.append(grad.view(-1))
                shares.append(sums[param.ds_id].view(-1).narrow(0, 0, grad.numel()))
            if self.reduce_and_partition_stream is not None and param.grad is not None:
                param.grad.record_stream(deepspeed.get_accelerator().current_stream())
            param.grad = None
        if not mine:
            return shares
        if self.micro_step_id == 0:
            torch._foreach_copy_(shares, mine)
        else:
            dtype = self.gradient_accumulation_dtype
            torch._foreach_add_(shares, [grad.to(dtype) for grad in mine])
        return shares

    def get_grad_norm_direct(
        self, gradients: list[torch.Tensor], params: list[nn.Parameter], norm_type: int = 2
    ) -> torch.Tensor:
        """Return the L2 norm of a sub-group's gradients over all ranks; -1 if it is not finite."""
        squares = torch.stack(norms_of(gradients)).pow(2.0).sum()
        dist.all_reduce(squares, group=self._get_param_partition_group(params[0]))
        norm = squares.pow(0.5)
        return norm.masked_fill(~torch.isfinite(norm), -1.0)


class _WaitingOnTheDevice:
    """Stand-in for a stream: the current stream waits for it, where DeepSpeed makes the host wait.

    It replaces the stream of reductions only while DeepSpeed does nothing with that but wait.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        """Let the current stream wait for this one; the host goes on."""
        deepspeed.get_accelerator().current_stream().wait_stream(self._stream)


def _iter_params(module: Any, recurse: bool = False) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of a module in DeepSpeed's order, from a list made once.

    DeepSpeed makes the list at each fetch and release, several times a step for each module.
    """
    external = module.ds_external_parameters()
    cache = module.__dict__.setdefault("_listed_parameters", {})
    key = (recurse, len(external))
    if key not in cache:
        own = [parameter for _, parameter in module.named_parameters(recurse=recurse)]
        cache[key] = own + [parameter for _, parameter in external]
    return iter(cache[key])


for _module in stage3_modules:
    _module.iter_params = _iter_params
