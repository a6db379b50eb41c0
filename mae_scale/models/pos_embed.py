"""Fixed two-dimensional sine-cosine position embeddings, and their change of resolution."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def _sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """[N] positions -> [N, width]: sin of all frequencies, then cos of all."""
    frequencies = 1 / 10000 ** (np.arange(width // 2) / (width // 2))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_pos_embed(width: int, grid_size: int) -> torch.Tensor:
    """Position embedding of the class token (zeros) and a square grid of patches, row by row.

    The first half of the channels encodes the column, the second half the row; each half is
    sin ‖ cos with frequencies 1/10000^(k/(width/4)). Computed in float64.

    Args:
        width: D, divisible by 4.
        grid_size: patches along a side.

    Returns:
        float32 [1, 1 + grid_size**2, D].
    """
    row, column = np.divmod(np.arange(grid_size**2), grid_size)
    patches = np.concatenate([_sincos_1d(width // 2, column), _sincos_1d(width // 2, row)], axis=1)
    table = np.concatenate([np.zeros((1, width)), patches])
    return torch.from_numpy(table).float().unsqueeze(0)


def interpolate_pos_embed(pos_embed: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resample a position embedding to another square grid, as the authors' fine-tuning does.

    Bicubic, `align_corners=False`, without antialiasing (timm's `resample_abs_pos_embed`
    antialiases); the class token's row is untouched. The same grid is returned as it is.

    Args:
        pos_embed: [1, 1 + g*g, D].
        grid_size: patches along a side of the new grid.

    Returns:
        [1, 1 + grid_size**2, D], of the same dtype.
    """
    patches = resize_grid(pos_embed[:, 1:], (grid_size, grid_size))
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def resize_grid(patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resample the rows of a square grid to another grid, bicubic, without antialiasing.

    Args:
        patches: [1, g*g, D].
        size: rows and columns of the new grid.

    Returns:
        [1, rows * columns, D], of the same dtype; the same tensor where the grid is the same.
    """
    old = round(patches.shape[1] ** 0.5)
    if size == (old, old):
        return patches
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(patches.dtype)
