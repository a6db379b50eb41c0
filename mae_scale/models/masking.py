"""Masking (paper section 3, "Masking"; Table 1f): hashes of keys choose the removed patches."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from mae_scale.errors import UserError
from mae_scale.models.randomness_torch import below_torch, uniform_torch
from mae_scale.randomness import Purpose

Sampling = Literal["random", "block", "grid"]

_BLOCKS = 32  # number of blocks of an image; patches that they miss are removed at random
_SMALLEST_BLOCK = 16 / 196  # smallest share of the patches in a block, as in BEiT
_NARROWEST = 0.3  # smallest height divided by width of a block; the largest is its inverse
_ASPECTS = 64  # number of aspect ratios between the two


def mask_noise(
    seed: int,
    epoch: torch.Tensor,
    sample: torch.Tensor,
    num_patches: int,
    sampling: Sampling = "random",
    mask_ratio: float = 0.75,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the noise that chooses the patches to remove: those with the largest values.

    The noise is a pure function of (seed, epoch, sample, patch): it is the same for a sample on any
    device, in any batch, at any world size.

    - "random" is uniform in [0, 1).
    - "block" removes rectangles, one after the other, as BEiT does (arXiv 2106.08254, algorithm
      1), at random within the last one. The first of 32 blocks has the largest noise. The area of a
      block is uniform from 16/196 of the patches to all that are to be removed, its height divided
      by width log-uniform from 0.3 to 1/0.3, and its place uniform.
    - "grid" keeps the first of every two by two patches.

    Args:
        seed: seed of the run.
        epoch, sample: int64 [B], on the device where the noise is wanted; sample is the global id.
        num_patches: number of patches per image, L.
        sampling: see above (paper Figure 6).
        mask_ratio: share of the patches that will be removed; "block" makes no larger blocks.
        grid: rows and columns of patches; None: they are a square.

    Returns:
        float32 [B, L].

    Raises:
        UserError: see `check_sampling`.
    """
    check_sampling(sampling, num_patches, mask_ratio, grid)
    patch = torch.arange(num_patches, device=sample.device)
    noise = uniform_torch(Purpose.MASK, seed, epoch[:, None], sample[:, None], patch)
    if sampling == "random":
        return noise
    rows, columns = grid or (math.isqrt(num_patches),) * 2
    row, column = patch // columns, patch % columns
    if sampling == "grid":
        return noise + ((row % 2 > 0) | (column % 2 > 0))
    number = torch.arange(_BLOCKS, device=sample.device)
    keys = (Purpose.MASK_BLOCK, seed, epoch[:, None], sample[:, None], number)
    sizes = _block_sizes(
        rows, columns, num_patches - num_kept(num_patches, mask_ratio), sample.device
    )
    height, width = sizes[below_torch(len(sizes), *keys, 0)].unbind(-1)  # [B, 32]
    top = below_torch(rows - height + 1, *keys, 1)[..., None]
    left = below_torch(columns - width + 1, *keys, 2)[..., None]
    in_rows = (row >= top) & (row < top + height[..., None])  # [B, 32, L]
    in_columns = (column >= left) & (column < left + width[..., None])
    blocks_left = (_BLOCKS - number)[:, None] * (in_rows & in_columns)
    return noise + blocks_left.amax(dim=1)


@lru_cache  # a copy to a GPU waits for the work that is queued there
def _block_sizes(rows: int, columns: int, removed: int, device: torch.device) -> torch.Tensor:
    """List heights and widths of blocks of every area, int64 [areas * aspects, 2]."""
    smallest = min(removed, math.ceil(_SMALLEST_BLOCK * rows * columns))
    area = np.arange(smallest, removed + 1)[:, None]
    aspect = np.geomspace(_NARROWEST, 1 / _NARROWEST, _ASPECTS)
    sizes = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=-1)
    sizes = sizes.round().clip(1, (rows, columns)).astype(np.int64)
    return torch.from_numpy(sizes).view(-1, 2).to(device)


def check_sampling(
    sampling: str, num_patches: int, mask_ratio: float, grid: tuple[int, int] | None = None
) -> None:
    """Raise a UserError where a kind of sampling does not fit the patches and the ratio."""
    if sampling not in ("random", "block", "grid"):
        raise UserError(f"mask_sampling {sampling!r} must be random, block or grid")
    kept = num_kept(num_patches, mask_ratio)
    rows, columns = grid or (math.isqrt(num_patches),) * 2
    if sampling == "grid" and (rows % 2 or columns % 2 or 4 * kept != num_patches):
        found = f"{rows}" if rows == columns else f"{rows} and {columns}"
        raise UserError(
            f"mask_sampling grid keeps one of every four patches: with mask_ratio {mask_ratio} and "
            f"{found} patches a side it cannot; use 0.75 and an even number"
        )


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Count the patches of an image that stay visible: `int(L * (1 - mask_ratio))`.

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
        noise: [B, L], as from `mask_noise`.
        mask_ratio: share of patches to remove.

    Returns:
        ids_keep: int64 [B, K], the visible patches in the order of their noise.
        mask: float32 [B, L], 0 kept, 1 removed.
        ids_restore: int64 [B, L], the place of each patch in that order (the rest follow the kept).

    Raises:
        UserError: see `num_kept`.
    """
    kept = num_kept(noise.shape[1], mask_ratio)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1, stable=True)
    return ids_shuffle[:, :kept], (ids_restore >= kept).float(), ids_restore
