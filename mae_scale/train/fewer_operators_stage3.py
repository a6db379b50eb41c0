"""ZeRO 3 with fewer operators and less Python: the counterpart of `fewer_operators`.

Every number has the bits that DeepSpeed computes. Gradients are copied and measured for many
parameters at once, and one step of the optimiser serves all groups. Left out are some things that
DeepSpeed does: listing a module's parameters anew at each fetch and release, marking ranges for
NVIDIA's profiler and making messages that nobody sees (see `ds`), counting hooks, reading the
signature of an autograd function at each call, looking for flushes of CUDA's allocator, and asking
the device whether the norm is finite, which `nonfinite.StepGuard` decides on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mae_scale.train.ds import (
    DeepSpeedZeroOptimizer_Stage3,
    LinearFunctionForZeroStage3,
    deepspeed,
    stage3,
    stage3_modules,
)
from mae_scale.train.fewer_operators import squares_of_norms

dist = deepspeed.comm


def use_fewer_operators_at_stage_3(optimizer: Any) -> None:
    """Let a ZeRO optimiser of stage 3 handle many parameters at once, if that is possible."""
    if not (optimizer.zenflow or optimizer.model_parallel_rank):
        optimizer.__class__ = FewerOperatorsStage3
    functions = {LinearFunctionForZeroStage3}
    for module in optimizer.module.modules():
        functions |= {getattr(module, name, None) for name in ("pre_bwd_fn", "post_bwd_fn")}
    for function in functions - {None}:  # autograd asks for the signature at each call
        function.forward.__signature__ = inspect.signature(function.forward)


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

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step on this rank's share of all sub-groups at once.

        DeepSpeed steps on one sub-group after the other, and each time goes through all groups of
        the optimiser. Layer-wise decay has some 50 of them.
        """
        low, high = self.fp16_partitioned_groups_flat, self.fp32_partitioned_groups_flat
        swapped = self.offload_optimizer or any(flat is None for flat in low)
        if swapped or self.clip_grad or self.loss_scale != 1:
            super().step(closure)
            return
        self._pre_step()
        self._partition_all_parameters()
        self.overflow = False
        self._global_grad_norm = self._norm()
        self._update_scale(False)  # counts the step; DeepSpeed saves the count
        self.zero_grad(set_to_none=True)
        groups = self.optimizer.param_groups
        for i, master in enumerate(high):
            self._give_gradient(i)
            groups[self.sub_group_to_group_id[i]]["params"].append(master)
        try:
            self.optimizer.step()
        finally:
            for group in groups:
                group["params"] = []
        if any(a is not b for a, b in zip(low, high, strict=True)):
            torch._foreach_copy_(low, high)
        for i, master in enumerate(high):
            master.grad = None
            shares = _joined(self.fp16_partitioned_groups[i])
            if shares is None or shares.data_ptr() != low[i].data_ptr():
                self._unflatten_partitioned_parameters(i)
        self._post_step(set())

    def _norm(self) -> torch.Tensor:
        """Return the gradient's L2 norm over all ranks: a scalar, infinite if it is not finite."""
        gradients = [self.averaged_gradients[i] for i, _ in enumerate(self.fp16_groups)]
        squares = squares_of_norms(gradients, gradients[0][0].device)
        dist.all_reduce(squares, group=self._get_param_partition_group(self.fp16_groups[0][0]))
        norms = squares.pow(0.5)
        norms = norms.masked_fill(~torch.isfinite(norms), -1.0)
        return stage3.combine_grad_norm_groups(norms.unbind())

    def _give_gradient(self, i: int) -> None:
        """Give the gradients of a sub-group to its master; they are copied only if they must be.

        As a rule all gradients of this rank are one tensor, in the order of the sub-groups.
        """
        master, whole = self.fp32_partitioned_groups_flat[i], _joined(self.averaged_gradients[i])
        if whole is None or whole.dtype != master.dtype:
            self._prepare_fp32_grad_for_sub_group(i)
        else:
            master.grad, self.averaged_gradients[i] = whole, None


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Return a flat view of tensors that lie one after the other; None if they do not."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end:
            return None
        end += tensor.numel() * tensor.element_size()
    if first.untyped_storage().data_ptr() != tensors[-1].untyped_storage().data_ptr():
        return None
    number = sum(tensor.numel() for tensor in tensors)
    return first.as_strided((number,), (1,), first.storage_offset())


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
