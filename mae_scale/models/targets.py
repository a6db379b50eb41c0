"""What the decoder is to predict (paper section 3, "Reconstruction target"), always in fp32."""

from __future__ import annotations

import torch


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, 3, H, W] -> [B, L, p*p*3]; patches row by row, within a patch (row, column, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, L, p*p*C] of a square image -> [B, C, H, W]; the inverse of `patchify`."""
    b, num_patches, d = patches.shape
    p, g = patch_size, round(num_patches**0.5)
    x = patches.reshape(b, g, g, p, p, d // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, g * p, g * p)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, both [B, L, 1].

    The deviation is sqrt(var + 1e-6) with the unbiased variance, as in the authors' code.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (var + 1e-6).sqrt()


def reconstruction_loss(
    images: torch.Tensor,
    pred: torch.Tensor,
    mask: torch.Tensor,
    patch_size: int,
    norm_pix_loss: bool,
) -> torch.Tensor:
    """Mean squared error over the removed patches of the whole batch, in fp32.

    Args:
        images: [B, 3, H, W], normalised.
        pred: [B, L, p*p*3], any floating dtype.
        mask: [B, L], 1 on removed patches.
        norm_pix_loss: the target is each patch normalised by its own mean and deviation.

    Returns:
        float32 scalar.
    """
    target = patchify(images.float(), patch_size)
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    per_patch = (pred.float() - target).square().mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()
