"""Bytes of an image's activations in training, by formula.

The forward pass is a sequence of parts. Autograd keeps tensors of each part until the backward pass
has passed it. So the memory at a part is the sum of what all parts up to it keep, what this part
computes again, and the temporary tensors of its backward pass; the peak is the largest such sum.

The formulas count the distinct storages that autograd saves. A GPU and a CPU save the same, except
for the statistics of LayerNorm (fp32 on a GPU, the dtype of the weights on a CPU). Attention is
PyTorch's fused one, which saves a logarithm in fp32 per head and token instead of the T x T matrix.
Blocks compiled with torch.compile keep about as much or less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, Mlp

from mae_scale.models.classifier import Classifier, ProbeHead
from mae_scale.models.encoder import Encoder
from mae_scale.models.mae import MaskedAutoencoderViT

INT64, FP32 = 8, 4  # bytes of a value


@dataclass(frozen=True)
class Part:
    """A section of the forward pass; bytes are for each image unless stated otherwise."""

    kept: float = 0
    """Bytes on the device from this part's forward pass until its backward pass."""
    again: float = 0
    """Bytes of tensors that are computed again for this part's backward pass."""
    passing: float = 0
    """Bytes of temporary tensors at the worst moment of this part."""
    host: float = 0
    """Bytes in host memory until the backward pass."""
    gradient: float = 0
    """Bytes of the gradient of the part's largest weight, once and not for each image."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of numbers in bytes."""

    value: int
    """Bytes of a weight or activation."""
    statistic: int
    """Bytes of one of LayerNorm's statistics."""


def sizes(dtype: torch.dtype, device_type: str = "cuda") -> Sizes:
    """Return the sizes for a dtype of weights and activations, on "cuda" or "cpu"."""
    return Sizes(dtype.itemsize, FP32 if device_type == "cuda" else dtype.itemsize)


def kept_bytes(parts: Iterable[Part]) -> float:
    """Add up the bytes that an image's forward pass leaves on the device for the backward pass."""
    return sum(part.kept for part in parts)


def host_bytes(parts: Iterable[Part]) -> float:
    """Add up the bytes that an image's forward pass leaves in host memory."""
    return sum(part.host for part in parts)


def peak_bytes(parts: Iterable[Part], images: int) -> float:
    """Return the most bytes that a micro-batch of `images` images takes on the device."""
    kept, peak = 0.0, 0.0
    for part in parts:
        kept += part.kept
        peak = max(peak, images * (kept + part.again + part.passing) + part.gradient)
    return peak


def activation_parts(model: Encoder, size: Sizes) -> list[Part]:
    """List the parts of a training step, with the model's checkpointing, offload and frozen blocks.

    Args:
        model: masked autoencoder or classifier; it may be on the meta device.
        size: sizes of numbers, as returned by `sizes`.
    """
    if isinstance(model, MaskedAutoencoderViT):
        return _mae_parts(model, size)
    assert isinstance(model, Classifier)
    return _classifier_parts(model, size)


def blocks_parts(model: Encoder, blocks: Iterable[Any], tokens: int, size: Sizes) -> list[Part]:
    """Make a part for each of the transformer blocks, which process `tokens` tokens of an image."""
    return [_block_part(model, number, block, tokens, size) for number, block in enumerate(blocks)]


def _block_part(model: Encoder, number: int, block: Any, tokens: int, size: Sizes) -> Part:
    """Compute the part of a block of which all, the MLP with its norm, or nothing is trained.

    With T tokens, D channels and an MLP of 4 D, a trained block keeps 16 T D values: the inputs of
    both norms, of qkv, of attention (3), of proj, of fc1 and, 4 each, of GELU and fc2.
    """
    unit = tokens * block.attn.proj.in_features * size.value
    hidden = tokens * block.mlp.fc1.out_features * size.value
    statistics = 2 * tokens * size.statistic
    if not any(p.requires_grad for p in block.parameters()):
        # Inputs of the first block, of this one, of its MLP and of fc1; and before and after GELU.
        return Part(passing=4 * unit + 2 * hidden + _batch(model, False))
    whole = block.norm1.weight.requires_grad
    paths = [block.drop_path1, block.drop_path2] if whole else [block.drop_path2]
    saved = 2 * unit + 2 * hidden + statistics
    saved += size.value * sum(isinstance(path, DropPath) for path in paths)
    if whole:
        saved += 6 * unit + statistics + FP32 * tokens * block.attn.num_heads
    passing = unit + hidden  # gradients of the block's output and of GELU's
    gradient = block.mlp.fc2.weight.numel() * size.value
    if not model.recomputes(number):
        return Part(kept=saved, passing=passing, gradient=gradient)
    kept, host = (0, unit) if model.offloads else (unit, 0)
    return Part(kept, saved - (kept if whole else 0), passing, host, gradient)


def _image_bytes(model: Encoder) -> int:
    """Return the number of an image's values, which is also its bytes in uint8."""
    return model.in_chans * model.patch_embed.img_size[0] * model.patch_embed.img_size[1]


def _batch(model: Encoder, image_is_kept: bool) -> int:
    """Return the bytes of an image in the batch.

    It exists in uint8 and in fp32 during the whole forward pass. With `image_is_kept` the fp32
    bytes are counted elsewhere.
    """
    return _image_bytes(model) * (1 if image_is_kept else 1 + FP32)


def _mae_parts(model: MaskedAutoencoderViT, size: Sizes) -> list[Part]:
    value, patches = size.value, model.num_patches
    embed_dim, width = model.decoder_embed.in_features, model.decoder_embed.out_features
    visible, tokens = model.encoder_tokens, 1 + patches
    outputs = model.decoder_pred.out_features
    only_visible = model.projects_visible_only
    seen = visible - 1 if only_visible else patches
    embedded = seen * embed_dim * value
    predicted = tokens * outputs * value
    difference = patches * outputs * FP32  # of prediction and target; or the logarithm of softmax
    # The order of the patches and all embeddings, from which the visible ones are taken; or, with
    # mask tokens in the encoder, which ones are replaced.
    masked = patches if model.mask_tokens_in_encoder else patches * INT64 + embedded
    if only_visible:
        masked = 0  # visible patches are taken from pixels, which need no gradient
    # Visible and mask tokens before they are put in order, and that order.
    ordered = 0 if model.mask_tokens_in_encoder else patches * (INT64 + width * value)
    ids = patches * INT64 if model.target.needs_tokenizer else 0
    return [
        Part(  # the image
            kept=_image_bytes(model) * seen // patches * value + masked,
            passing=2 * embedded,
            gradient=model.patch_embed.proj.weight.numel() * value,
        ),
        *blocks_parts(model, model.blocks, visible, size),
        # norm and decoder_embed
        Part(visible * (2 * embed_dim * value + 2 * size.statistic)),
        Part(ordered),
        *blocks_parts(model, model.decoder_blocks, tokens, size),
        Part(  # decoder_norm and decoder_pred
            kept=tokens * (2 * width * value + 2 * size.statistic),
            passing=2 * predicted,
            gradient=model.decoder_pred.weight.numel() * value,
        ),
        Part(  # the loss: difference and mask; then target and square, too
            kept=difference + patches * FP32 + ids,
            passing=2 * difference + predicted + _batch(model, value == FP32 and seen == patches),
        ),
    ]


def _classifier_parts(model: Classifier, size: Sizes) -> list[Part]:
    value, tokens, width = size.value, model.encoder_tokens, model.cls_token.shape[-1]
    unit = tokens * width * value
    projection = model.patch_embed.proj.weight
    embed = Part()
    if projection.requires_grad:
        embed = Part(_image_bytes(model) * value, passing=unit, gradient=projection.numel() * value)
    is_probe = isinstance(model.head, ProbeHead)
    rows = tokens if model.pool == "token" and not is_probe else 1  # kept features
    head = rows * width * value  # input of the head, and of the last norm if that is trained
    if model.final_norm.weight.requires_grad:
        head += rows * (width * value + 2 * size.statistic)
    if isinstance(model.head, Mlp):
        head += 2 * width * value  # before and after GELU
    targets = INT64 if is_probe else model.num_classes * FP32
    return [
        embed,
        *blocks_parts(model, model.blocks, tokens, size),
        Part(head, passing=unit, gradient=model.last_linear.weight.numel() * value),
        Part(  # the loss
            kept=model.num_classes * FP32 + targets,
            passing=_batch(model, projection.requires_grad and value == FP32),
        ),
    ]
