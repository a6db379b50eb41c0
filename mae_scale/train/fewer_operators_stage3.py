"""ZeRO 3 with fewer operators and less Python: the counterpart of `fewer_operators`.

Every number has the bits that DeepSpeed computes with the linear layers of `linear_stage3`.
Gradients are copied and measured for many parameters at once, and one step of the optimiser serves
all groups. The gradients of a message wait where they are (`contiguous_gradients` is false in
`zero3`) and are written to one tensor that has a row for each rank; DeepSpeed would make a tensor
for each parameter and rank. Left out are some things that DeepSpeed does: waiting between streams
for each parameter instead of each message, listing a module's parameters anew at each fetch and
release, marking ranges for NVIDIA's profiler and making messages that nobody sees (see `ds`),
counting hooks, matching the arguments of an autograd function with its signature at each call,
looking for flushes of CUDA's allocator, and asking the device whether the norm is finite, which
`nonfinite.StepGuard` decides on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mae_scale.train.ds import (
    DeepSpeedZeroOptimizer_Stage3,
    InflightParamRegistry,
    PartitionedParameterCoordinator,
    deepspeed,
    partition_parameters,
    stage3,
    stage3_modules,
)
from mae_scale.train.fewer_operators import squares_of_norms

dist = deepspeed.comm
AVAILABLE = partition_parameters.ZeroParamStatus.AVAILABLE


def use_fewer_operators_at_stage_3(optimizer: Any) -> None:
    """Let a ZeRO optimiser of stage 3 handle many parameters at once, if that is possible."""
    if not (optimizer.zenflow or optimizer.model_parallel_rank):
        optimizer.__class__ = FewerOperatorsStage3
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        if optimizer.parameter_offload.zero_param_parallel_group is None:
            coordinator.__class__ = FewerCalls
        optimizer.module.ds_inflight_param_registry.__class__ = WholeMessages
    optimizer.module.modules = _Listed(optimizer.module)
    for module in optimizer.module.modules():
        functions = [vars(module).get(name) for name in ("pre_bwd_fn", "post_bwd_fn")]
        for function in filter(None, functions):  # autograd asks for the signature at each call
            function.forward.__signature__ = _Signature.from_callable(function.forward)


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

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        """Put a gradient into the bucket as it is; send the bucket first if it is full."""
        if self.offload_optimizer or self.contiguous_gradients or not self.reduce_scatter:
            super().reduce_independent_p_g_buckets_and_remove_grads(param)
            return
        dtype, number = self.get_param_comm_dtype(param), param.ds_numel
        bucket = self.ipg_buckets[dtype]
        if bucket.params and bucket.elements + number > self.reduce_bucket_size:
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        bucket.params.append(param)
        bucket.elements += number

    def _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(self, dtype: Any) -> None:
        """Send the gradients of a bucket when they have been computed, and keep this rank's
        share."""
        if not self.ipg_buckets[dtype].params:
            return
        if self.reduce_and_partition_stream is not None:
            now = deepspeed.get_accelerator().current_stream()
            self.reduce_and_partition_stream.wait_stream(now)
        super()._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params: list[Any], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Average the gradients of a bucket over all ranks.

        DeepSpeed makes a tensor for each parameter and rank, here there is one for each parameter.

        Returns:
            This rank's share of each parameter's gradient: [values of the parameter / ranks],
            rounded up, where the last rank's end is padding.
        """
        if self.gradient_predivide_factor != 1.0 or self.all2all_process_group is not None:
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params, dtype)
        group = self._get_param_partition_group(params[0])
        ranks = dist.get_world_size(group)
        sizes = [-(-param.ds_numel // ranks) for param in params]
        shares = torch.empty(ranks, sum(sizes), dtype=dtype, device=params[0].grad.device)
        torch._foreach_copy_(
            list(shares.split(sizes, dim=1)),
            [_in_shares(p.grad, ranks, size) for p, size in zip(params, sizes, strict=True)],
        )
        own = shares[dist.get_rank(group)]
        if ranks > 1:
            shares.div_(ranks)
            dist.reduce_scatter_fn(own, shares.view(-1), group=group)
        return list(own.to(self.gradient_accumulation_dtype).split(sizes))

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
        rank = self._get_param_partition_rank(params_to_release[0])  # the same for all of them
        for param, grad in zip(params_to_release, grad_partitions, strict=True):
            if param.partition_numel() * rank < param.ds_numel:
                share = sums[param.ds_id]
                mine.append(grad)
                shares.append(share if share.shape == grad.shape else share[: grad.numel()])
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


class FewerCalls(PartitionedParameterCoordinator):
    """The coordinator of ZeRO 3, which frees gathered weights by a single call for each."""

    def _PartitionedParameterCoordinator__release_param(
        self, param: Any, free_data: bool = True
    ) -> None:
        if param.ds_status != AVAILABLE or param.ds_active_sub_modules:
            return
        if free_data and param.ds_tensor.final_location is None:
            partition_parameters.free_param(param)
        else:  # weights on an NVMe
            param.partition(free_data=free_data)
        self._PartitionedParameterCoordinator__n_available_params -= param.ds_numel


class WholeMessages(InflightParamRegistry):
    """The weights that are being gathered: those that share a message have come at once.

    DeepSpeed waits for each of them on its own, and changes streams and makes an event each time.
    """

    def pop(self, param: Any) -> Any:
        """Take a parameter and all others of its message out, and return the message's handle."""
        handle = self.data.pop(param)
        for other in [other for other, its in self.data.items() if its is handle]:
            del self.data[other]
        return handle


class _Listed:
    """The method `modules` of a module that gets no others any more, from a list made once.

    DeepSpeed goes through all modules twice a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._method, self._modules = module.modules, list(module.modules())

    def __call__(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return iter(self._modules) if remove_duplicate else self._method(remove_duplicate)


class _Signature(inspect.Signature):
    """The signature of a function all of whose arguments are always given, by position."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    """Arguments as `inspect.BoundArguments` gives them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None: ...


def _in_shares(gradient: torch.Tensor, ranks: int, size: int) -> torch.Tensor:
    """Return a gradient as one row for each rank's share: [ranks, size], padded with zeros."""
    flat = gradient.reshape(-1)
    missing = ranks * size - flat.numel()
    return (functional.pad(flat, (0, missing)) if missing else flat).view(ranks, size)


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
