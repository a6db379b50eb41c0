"""ZeRO 1 and 2 in bf16 with fewer operators: many parameters are handled at once.

DeepSpeed 0.19 converts, copies, adds and measures the gradient of each parameter on its own: about
7 operators for each of a ViT-L's 400 parameters. At small micro-batches a GPU then waits for the
host. Here the gradients of a bucket are copied, sent and added together, and those of all groups
are made and measured together: layer-wise decay has some 50 groups, whose new weights are gathered
in one message. Every number has the bits that DeepSpeed computes, and checkpoints are the same,
too.

With `overlap_comm` the device waits here for the stream of reductions, where DeepSpeed makes the
host wait for everything that the device has been given to do.

At stage 1 without `overlap_comm` nothing is done for a parameter while the backward pass computes,
and one process alone copies its gradients once, because there is nobody to send them to.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from mae_scale.train.ds import DeepSpeedZeroOptimizer, deepspeed

FEW_GROUPS = 4  # so many have a message each; more of them share one
PADDING = "_zero_padding"  # attribute by which DeepSpeed knows that a tensor is padding

dist = deepspeed.comm
unflatten = torch._C._nn.unflatten_dense_tensors


def use_fewer_operators(optimizer: Any) -> None:
    """Let a ZeRO optimiser of stage 1 or 2 handle many parameters at once, if that is possible."""
    plain = not (
        optimizer.cpu_offload
        or optimizer.has_moe_layers
        or optimizer.zenflow
        or not optimizer.contiguous_gradients
        or not optimizer.reduce_scatter
        or not optimizer.use_multi_rank_bucket_allreduce
        or not optimizer.gradient_average
        or optimizer.sequence_parallel_size > 1
        or len(optimizer.ipg_buckets) != 1
    )
    groups = range(len(optimizer.bit16_groups))
    if plain and all(optimizer._use_compact_grad_partition_buffer(i) for i in groups):
        optimizer.__class__ = FewerOperators
        optimizer.use_plain_hooks()


class Piece(NamedTuple):
    """A stretch of this rank's gradients: its share of a parameter, or padding."""

    group: int
    """Number of the optimiser's group."""
    form: torch.Tensor
    """Tensor of the stretch's shape, without values."""
    param_id: int | None
    """Id of the parameter; None: the stretch is padding."""
    start: int
    """Index of the share's first value in the parameter."""


class Gradients(list[torch.Tensor]):
    """This rank's fp32 gradients of a group: views of one tensor, as DeepSpeed expects them."""

    def __init__(self, flat_partition: torch.Tensor) -> None:
        super().__init__()
        self.flat_partition = flat_partition
        self.shares: dict[int, tuple[int, torch.Tensor]] = {}
        """By a parameter's id: index of the share's first value in the parameter, and its view."""


class FewerOperators(DeepSpeedZeroOptimizer):
    """The optimiser of ZeRO 1 and 2 for bf16 weights; its fp32 gradients are one tensor."""

    params_already_reduced: list[bool]
    _grad_acc_hooks: list[Any]
    _pieces: list[Piece] | None = None

    def should_refresh_expected_hook_count(self) -> bool:
        """Return False: only callers of `loss.backward()` itself need the count of hooks."""
        return False

    # Collecting the gradients

    def use_plain_hooks(self) -> None:
        """Let the hooks of the backward pass call `process_gradients`, if it has something to do.

        DeepSpeed's hooks keep accounts for callers of `loss.backward()`, too, which takes the host
        some time for each parameter. `engine.backward()` does not need the accounts.
        """
        for hook in self._grad_acc_hooks:
            hook.remove()
        self._grad_acc_hooks = []
        if not (self.partition_gradients or self.overlap_comm):
            return
        for i, group in enumerate(self.bit16_groups):
            for param in group:
                collect = partial(self.process_gradients, i=i)
                self._grad_acc_hooks.append(param.register_post_accumulate_grad_hook(collect))

    def process_gradients(self, param: torch.nn.Parameter, i: int) -> None:
        """Take the gradient of a parameter as soon as the backward pass has computed it."""
        self.setup_buckets()
        if self.partition_gradients or (
            self.overlap_comm and self.is_gradient_accumulation_boundary()
        ):
            self._collect(param, i)

    def fill_grad_accum_attribute(self) -> None:
        """Add the gradients of a micro-batch to the fp32 sums, at stage 1."""
        have = [p for group in self.bit16_groups for p in group if p.grad is not None]
        for part in _parts(have, self.reduce_bucket_size):
            flat = torch.empty(
                sum(p.numel() for p in part), dtype=self.gradient_accumulation_dtype,
                device=part[0].device,
            )  # fmt: skip
            grads = [p.grad for p in part]
            views = unflatten(flat, grads)
            torch._foreach_copy_(views, grads)
            old = [(p, v) for p, v in zip(part, views, strict=True) if p.grad_accum is not None]
            if old:
                torch._foreach_add_([p.grad_accum for p, _ in old], [view for _, view in old])
            for p, view in zip(part, views, strict=True):
                p.grad = None
                if p.grad_accum is None:
                    p.grad_accum = view

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Send all gradients after the last backward pass of a step, at stage 1."""
        if dist.get_world_size(group=self.dp_process_group) == 1 and not self.overlap_comm:
            for i, group in enumerate(self.bit16_groups):
                shares = self._get_compact_grad_partition_buffer(i).shares
                have = [p for p in group if p.grad is not None or _accumulated(p) is not None]
                _move_gradients(have, [shares[self.get_param_id(p)][1] for p in have])
            self.overlapping_partition_gradients_reduce_epilogue()
            return
        self.setup_buckets()
        if not self.overlap_comm:
            for i, group in enumerate(self.bit16_groups):
                for param in group:
                    if param.grad is not None or param.grad_accum is not None:
                        self._collect(param, i)
        self.overlapping_partition_gradients_reduce_epilogue()

    def _collect(self, param: torch.nn.Parameter, i: int) -> None:
        number = param.numel()
        if number == 0:
            return
        (bucket,) = self.ipg_buckets.values()
        if bucket.elements + number > self.reduce_bucket_size:
            self.reduce_ipg_grads()
            if self.overlap_comm:
                bucket.index = 1 - bucket.index
        param_id = self.get_param_id(param)
        if self.params_already_reduced[param_id]:
            raise RuntimeError(f"parameter {param_id} has two gradients in one backward pass")
        self.params_already_reduced[param_id] = True
        bucket.params.append((i, param, param_id))
        bucket.elements += number
        if self.overlap_comm and self.reduction_stream is not None:
            bucket.copy_streams.add(deepspeed.get_accelerator().current_stream())

    # Sending the buckets

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Sum the gradients of the bucket over all ranks, and keep this rank's share of them."""
        (bucket,) = self.ipg_buckets.values()
        if not bucket.params:
            return
        tensor = self._filled(bucket)
        if not (self.overlap_comm and self.reduction_stream is not None):
            self._send(tensor, bucket)
        else:
            accelerator = deepspeed.get_accelerator()
            now = accelerator.current_stream()
            self.reduction_stream.wait_stream(now)
            # The earlier reductions have read the buffer that is filled next.
            now.wait_stream(self.reduction_stream)
            with accelerator.stream(self.reduction_stream):
                tensor.record_stream(self.reduction_stream)
                self._send(tensor, bucket)
        bucket.clear()

    def _filled(self, bucket: Any) -> torch.Tensor:
        """Return the bucket's gradients as one flat tensor: fp32 at stage 1, bf16 at stage 2."""
        params = [param for _, param, _ in bucket.params]
        if bucket.copy_streams:  # the backward pass may have computed on several streams
            now = deepspeed.get_accelerator().current_stream()
            for stream in bucket.copy_streams - {now}:
                now.wait_stream(stream)
        if bucket.elements <= self.reduce_bucket_size:
            tensor = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
        else:  # one parameter that is larger than the bucket
            dtype = self._gradient_reduction_buffer_dtype()
            tensor = torch.empty(bucket.elements, dtype=dtype, device=params[0].device)
        _move_gradients(params, unflatten(tensor, params))
        return tensor

    def _send(self, tensor: torch.Tensor, bucket: Any) -> None:
        tensor.div_(dist.get_world_size(group=self.dp_process_group))
        total = tensor.to(self.communication_data_type)
        dist.all_reduce(total, group=self.dp_process_group)
        params = [param for _, param, _ in bucket.params]
        mine, shares = [], []
        for view, (i, param, param_id) in zip(
            unflatten(total.to(self.gradient_accumulation_dtype), params),
            bucket.params, strict=True,
        ):  # fmt: skip
            share = self._get_compact_grad_partition_buffer(i).shares.get(param_id)
            if share is None:
                continue
            start, place = share
            if place.shape != param.shape:
                view = view.view(-1).narrow(0, start, place.numel())
            mine.append(view)
            shares.append(place)
        if mine:
            torch._foreach_add_(shares, mine)

    def _get_compact_grad_partition_buffer(self, group_idx: int) -> Gradients:
        """Return this rank's gradients of a group; make those of all groups if there are none."""
        if self.averaged_gradients.get(group_idx) is None:
            self._make_gradients()
        return self.averaged_gradients[group_idx]

    def _make_gradients(self) -> None:
        if self._pieces is None:
            self._pieces = self._list_pieces()
        sizes = [int(size) for size in self.partition_size]
        device = deepspeed.get_accelerator().current_device_name()
        flat = torch.zeros(sum(sizes), dtype=self.gradient_accumulation_dtype, device=device)
        groups = [Gradients(part) for part in flat.split(sizes)]
        views = unflatten(flat, [piece.form for piece in self._pieces])
        for piece, view in zip(self._pieces, views, strict=True):
            groups[piece.group].append(view)
            if piece.param_id is None:
                setattr(view, PADDING, True)
            else:
                groups[piece.group].shares[piece.param_id] = (piece.start, view)
        self.averaged_gradients.update(enumerate(groups))

    def _list_pieces(self) -> list[Piece]:
        """List the stretches of this rank's gradients in their order, group by group."""
        rank, pieces = dist.get_rank(group=self.dp_process_group), []
        for i, params in enumerate(self.params_in_partition):
            size, end = int(self.partition_size[i]), 0
            starts = self.grad_start_offset[i][rank]
            places = self.grad_partition_insertion_offset[i][rank]
            for param in params:
                param_id = self.get_param_id(param)
                start, place = int(starts[param_id]), int(places[param_id])
                number = min(param.numel() - start, size - place)
                if place > end:
                    pieces.append(Piece(i, _form(place - end), None, 0))
                    end = place
                if number > 0:
                    form = _form(*(param.shape if number == param.numel() else [number]))
                    pieces.append(Piece(i, form, param_id, start))
                    end = place + number
            if end < size:
                pieces.append(Piece(i, _form(size - end), None, 0))
        return pieces

    def independent_gradient_partition_epilogue(self) -> None:
        """Send the last bucket, and let later work on the device wait for all buckets."""
        self.reduce_ipg_grads()
        self.params_already_reduced = [False] * len(self.params_already_reduced)
        if self.overlap_comm and self.reduction_stream is not None:
            deepspeed.get_accelerator().current_stream().wait_stream(self.reduction_stream)
        if self.is_gradient_accumulation_boundary():
            for i, _ in enumerate(self.bit16_groups):
                self._get_compact_grad_partition_buffer(i)
        self._release_ipg_buffers()
        self._clear_param_grad_only()
        self._epilogue_ran_this_backward = True

    # The step

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        """Return the gradient's L2 norm over all ranks: a scalar, infinite if it is not finite."""
        groups = [self.averaged_gradients[i] for i, _ in enumerate(self.bit16_groups)]
        own = [[v for v in group if not getattr(v, PADDING, False)] for group in groups]
        squares = squares_of_norms(own, groups[0].flat_partition.device).float()
        dist.all_reduce(squares, group=self.dp_process_group)
        norm = torch.linalg.vector_norm(squares.pow(0.5))
        return norm.masked_fill(~torch.isfinite(norm), float("inf"))

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Link the parameters to the flat weights, unless they are linked already."""
        flat = self.bit16_groups_flat[group_index]
        group = self.round_robin_bit16_groups[group_index]
        offsets = self.round_robin_bit16_offsets[group_index]
        linked = all(
            group[k].data_ptr() == flat.data_ptr() + offsets[k] * flat.element_size()
            for k in (0, len(group) - 1)
        )
        if not linked:
            super()._update_model_bit16_weights(group_index)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step on this rank's share of all groups at once, and gather the new weights."""
        if self.check_grad_overflow or self.clip_grad or self.loss_scale != 1:
            super().step(closure)
            return
        self.micro_step_id = -1
        self.overflow = False
        self._global_grad_norm = self.scaled_global_norm()
        self._update_scale(False)  # counts the step; DeepSpeed saves the count
        for i, master in enumerate(self.single_partition_of_fp32_groups):
            master.grad = self.averaged_gradients[i].flat_partition
            self.averaged_gradients[i] = self.all_grad_tensors[i] = None
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        rank = dist.get_rank(group=self.dp_process_group)
        shares = [partitions[rank] for partitions in self.parallel_partitioned_bit16_groups]
        torch._foreach_copy_(shares, list(self.single_partition_of_fp32_groups))
        for master in self.single_partition_of_fp32_groups:
            master.grad = None
        self._gather(shares)
        for i, _ in enumerate(shares):
            self._update_model_bit16_weights(i)

    def _gather(self, shares: list[torch.Tensor]) -> None:
        """Gather the new weights of all groups: many groups in one message, which is copied.

        Args:
            shares: this rank's share of each group: [values of the group / ranks].
        """
        ranks, flats = dist.get_world_size(group=self.dp_process_group), self.bit16_groups_flat
        if ranks == 1:
            return
        if len(shares) <= FEW_GROUPS:
            for flat, share in zip(flats, shares, strict=True):
                dist.all_gather_into_tensor(flat, share, self.dp_process_group)
            return
        mine = torch.cat(shares)
        whole = mine.new_empty(ranks, len(mine))
        dist.all_gather_into_tensor(whole.view(-1), mine, self.dp_process_group)
        parts = whole.split([len(share) for share in shares], dim=1)
        torch._foreach_copy_([flat.view(ranks, -1) for flat in flats], list(parts))


def squares_of_norms(groups: list[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Return the square of the L2 norm of each group of tensors, computed in fp64: [groups]."""
    tensors = [tensor for group in groups for tensor in group]
    if not tensors:
        return torch.zeros(len(groups), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    squares = norms.pow(2.0).split([len(group) for group in groups])
    return torch.stack([square.sum() for square in squares])


def _move_gradients(params: list[Any], places: list[torch.Tensor]) -> None:
    """Write each parameter's gradient plus its sum of earlier ones to a place; drop both."""
    both = list(zip(params, places, strict=True))
    fresh = [(place, p.grad) for p, place in both if p.grad is not None]
    if fresh:
        torch._foreach_copy_([place for place, _ in fresh], [grad for _, grad in fresh])
    summed = [(p, place) for p, place in both if _accumulated(p) is not None]
    added = [(place, p.grad_accum) for p, place in summed if p.grad is not None]
    if added:
        torch._foreach_add_([place for place, _ in added], [total for _, total in added])
    only = [(place, p.grad_accum) for p, place in summed if p.grad is None]
    if only:
        torch._foreach_copy_([place for place, _ in only], [total for _, total in only])
    for p in params:
        p.grad = p.grad_accum = None


def _form(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _accumulated(param: torch.nn.Parameter) -> torch.Tensor | None:
    return getattr(param, "grad_accum", None)


def _parts(tensors: list[Any], most: int) -> list[list[Any]]:
    """Cut a list of tensors into parts of at most `most` values, or of one larger tensor."""
    parts: list[list[Any]] = []
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.numel() > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.numel()
    return parts
