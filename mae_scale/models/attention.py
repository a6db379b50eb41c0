"""What the class token looks at: the attention of the encoder's last block."""

from __future__ import annotations

from typing import Any, cast

import torch

from mae_scale.models.encoder import Encoder


@torch.no_grad()
def class_attention(model: Encoder, images: torch.Tensor) -> torch.Tensor:
    """Compute the class token's attention to each patch in the last block, for each head.

    The class token sees itself, too, so the attention to all patches sums up to less than 1.

    Args:
        model: masked autoencoder or classifier, in evaluation mode.
        images: float [B, C, H, W], normalised.

    Returns:
        float32 [B, heads, rows, columns] of the model's grid.
    """
    *first, block = cast("list[Any]", list(model.blocks))
    x = model.prepend_cls_token(model.embed_patches(images))
    for earlier in first:
        x = earlier(x)
    attention, x = block.attn, block.norm1(x)
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1)
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, width of a head]
    queries, keys = attention.q_norm(queries[:, :, :1]), attention.k_norm(keys)
    shares = (queries * attention.scale @ keys.transpose(-2, -1)).float().softmax(dim=-1)
    return shares[:, :, 0, 1:].unflatten(-1, model.grid)
