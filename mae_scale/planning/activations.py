"""Bytes of activations in training, counted on the meta device with the model's own code.

A forward and backward pass runs without memory, and the bytes of all tensors that are alive are
added up. The operators are those of a GPU: attention is one operator, which keeps a logarithm in
fp32 for each head and token instead of the T x T matrix, and under autocast layers compute in bf16.
Memory that is used only within an operator, and what the allocator loses, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_scale.planning.flops import TrialLoss, blank_images


@dataclass(frozen=True)
class Activations:
    """Most bytes that a micro-batch takes beside the weights and their gradients."""

    constant: float  # bytes of every micro-batch, such as weights in bf16 under autocast
    each: float  # further bytes for each image
    inputs: float  # bytes for each image that `train.activation_offload` keeps in host memory

    def peak(self, images: int, offload: bool = False) -> float:
        """Compute the bytes of a micro-batch of `images` images.

        Between the two that were counted the truth lies slightly below the straight line: the peak
        is the largest of several sums, each of which is a part for each image and a constant.
        """
        return max(0.0, self.constant + images * (self.each - self.inputs * offload))

    def towards(self, other: Activations, share: float) -> Activations:
        """Return what lies at `share` of the way to the activations of another checkpointing."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Activations(*(low + share * (high - low) for low, high in pairs))


class _Alive(TorchDispatchMode):
    """Counter of the bytes of storages that operators return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        there = [*model.parameters(), *model.buffers()]
        # A storage is one object in Python as long as it lives; these live longer than the counter.
        self._there = [tensor.untyped_storage() for tensor in there]
        self._known: dict[int, Any] = {id(storage): None for storage in self._there}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def drop(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, drop)
        self.now += size


class _Attention(torch.autograd.Function):
    """The tensors that fused attention keeps and returns, without their values."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        logarithm = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logarithm, *(() if bias is None else (bias,)))
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, _out, _logarithm, *bias = ctx.saved_tensors
        wanted = bias and ctx.needs_input_grad[3]
        grads = [torch.empty_like(x) for x in (q, k, v)]
        return (*grads, torch.empty_like(bias[0]) if wanted else None)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    return _Attention.apply(query, key, value, attn_mask)


def _in_bf16(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Cast what a layer gets, as `torch.autocast` does."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        return function(*(_half(x) for x in args), **{k: _half(v) for k, v in kwargs.items()})

    return call


def _half(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x


@contextmanager
def _operators_of_a_gpu(autocast: bool) -> Iterator[None]:
    layers = ("linear", "conv2d", "conv_transpose2d") if autocast else ()
    own = {(F, name): _in_bf16(getattr(F, name)) for name in layers}
    if autocast:
        own[torch, "einsum"] = _in_bf16(torch.einsum)
    own[F, "scaled_dot_product_attention"] = _attention
    before = {place: getattr(*place) for place in own}
    try:
        for place, function in own.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def activations(
    model: Any, trial_loss: TrialLoss, most: int, *, autocast: bool = False
) -> Activations:
    """Count the activations of micro-batches, with the model's checkpointing and frozen parameters.

    Args:
        model: model on the meta device, in the dtype of its weights. Its gradients are freed at
            once: other formulas count them.
        trial_loss: function that computes the loss of the model for images.
        most: largest number of images of a micro-batch that is asked for.
        autocast: whether layers compute in bf16 while the weights are fp32.
    """
    hooks, inputs = [], {}

    def free(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(free))

    def count(images: int) -> int:
        with torch.device("meta"), _operators_of_a_gpu(autocast), _Alive(model) as alive:
            torch.autograd.backward([trial_loss(model, blank_images(model, images))])
        return alive.peak

    def note(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[block] = args[0].nbytes / len(args[0])

    hooks += [block.register_forward_pre_hook(note) for block in _recomputed(model)]
    many = max(4, most)
    low, high = count(2), count(many)
    for hook in hooks:
        hook.remove()
    each = (high - low) / (many - 2)
    return Activations(low - 2 * each, each, sum(inputs.values()))


def _recomputed(model: Any) -> list[nn.Module]:
    encoder = getattr(model, "backbone", model)
    stacks = [encoder.blocks, getattr(encoder, "decoder_blocks", ())]
    return [
        block
        for blocks in stacks
        for number, block in enumerate(blocks)
        if encoder.recomputes(number) and any(p.requires_grad for p in block.parameters())
    ]
