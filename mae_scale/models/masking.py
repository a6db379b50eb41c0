"""Random masking of patches (paper section 3, "Masking"), from noise that is a hash of its keys."""

from __future__ import annotations

import torch

from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, uniform_torch


def mask_noise(
    seed: int, epoch: torch.Tensor, sample: torch.Tensor, num_patches: int
) -> torch.Tensor:
    """Uniform noise that decides which patches of each sample are removed.

    A pure function of (seed, epoch, sample, patch): the same for a sample on any device, in any
    batch, at any world size.

    Args:
        seed: of the run.
        epoch, sample: int64 [B], on the device where the noise is wanted; sample is the global id.
        num_patches: L, patches per image.

    Returns:
        float32 [B, L] in [0, 1).
    """
    patch = torch.arange(num_patches, device=sample.device)
    return uniform_torch(Purpose.MASK, seed, epoch[:, None], sample[:, None], patch)


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many of an image's patches stay visible: `int(L * (1 - mask_ratio))`.

    Raises:
        UserError: the ratio is outside (0, 1), or leaves nothing to see or nothing to predict.
    """
    if not 0 < mask_ratio < 1:
        raise UserError(f"mask_ratio {mask_ratio} must lie between 0 and 1, both excluded")
    if num_patches < 2:
        raise UserError(
            f"an image of {num_patches} patch cannot be masked: make img_size at least twice "
            "patch_size"
        )
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {kept} of {num_patches} patches; at least one must "
            f"stay and one go, so choose from {1 / num_patches:.3g} to {1 - 1 / num_patches:.3g}"
        )
    return kept


def random_masking(
    noise: torch.Tensor, mask_ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the patches with the smallest noise.

    The sort is stable, so equal noise cannot make devices differ.

    Args:
        noise: [B, L].
        mask_ratio: share of patches to remove.

    Returns:
        ids_keep: int64 [B, K], the visible patches in the order of their noise.
        mask: float32 [B, L], 0 kept, 1 removed.
        ids_restore: int64 [B, L], the place of each patch in that order (the rest follow the kept).

    Raises:
        UserError: as `num_kept`.
    """
    kept = num_kept(noise.shape[1], mask_ratio)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1, stable=True)
    return ids_shuffle[:, :kept], (ids_restore >= kept).float(), ids_restore
