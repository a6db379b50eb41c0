"""Fixed two-dimensional sine-cosine position embeddings, and their change of resolution."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def _sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """Encode positions [N] as [N, width]: the sines of all frequencies, then the cosines."""
    frequencies = 1 / 10000 ** (np.arange(width // 2) / (width // 2))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


Grid = int | tuple[int, int]  # patches along each side of a square, or rows and columns


def _rows_and_columns(grid: Grid) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else grid


def sincos_pos_embed(width: int, grid_size: Grid) -> torch.Tensor:
    """Return the position embedding of the class token (zeros) and a grid of patches, by rows.

    The first half of the channels encodes the column, the second half the row; each half is
    sin ‖ cos with frequencies 1/10000^(k/(width/4)). It is computed in float64.

    Args:
        width: D, divisible by 4.
        grid_size: patches along a side, or rows and columns.

    Returns:
        float32 [1, 1 + rows * columns, D].
    """
    rows, columns = _rows_and_columns(grid_size)
    row, column = np.divmod(np.arange(rows * columns), columns)
    patches = np.concatenate([_sincos_1d(width // 2, column), _sincos_1d(width // 2, row)], axis=1)
    table = np.concatenate([np.zeros((1, width)), patches])
    return torch.from_numpy(table).float().unsqueeze(0)


def interpolate_pos_embed(
    pos_embed: torch.Tensor, grid_size: Grid, old: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resample a position embedding to another grid, as the authors' fine-tuning does.

    Resampling is bicubic with `align_corners=False`, without antialiasing (timm's
    `resample_abs_pos_embed` antialiases). The class token's row is untouched. For the same grid the
    result is the argument itself.

    Args:
        pos_embed: [1, 1 + L, D].
        grid_size: patches along a side of the new grid, or its rows and columns.
        old: rows and columns of the grid of `pos_embed`; None: a square.

    Returns:
        [1, 1 + rows * columns, D], of the same dtype.
    """
    patches = resize_grid(pos_embed[:, 1:], _rows_and_columns(grid_size), old)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def resize_grid(
    patches: torch.Tensor, size: tuple[int, int], old: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resample the patches of a grid to another grid, bicubically, without antialiasing.

    Args:
        patches: [1, L, D].
        size: rows and columns of the new grid.
        old: rows and columns of the old grid; None: a square.

    Returns:
        [1, rows * columns, D], of the same dtype; the same tensor where the grid is the same.
    """
    if old is None:
        side = round(patches.shape[1] ** 0.5)
        old = (side, side)
    if size == old:
        return patches
    grid = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(patches.dtype)


def is_sincos(table: torch.Tensor, grid: tuple[int, int]) -> bool:
    """Return whether a position embedding [1, 1 + L, D] is the sine-cosine one of a grid."""
    # Published embeddings were computed in other ways, and may be stored in fewer bits.
    return torch.allclose(table.float(), sincos_pos_embed(table.shape[2], grid), atol=1e-2)


def grid_of_table(
    table: torch.Tensor, own: tuple[int, int], known: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return rows and columns of a position embedding's grid; None where they are unknown.

    Args:
        table: [1, 1 + L, D].
        own: rows and columns of patches of the model that will take the embedding.
        known: rows and columns that the weights state; None: they state none.
    """
    patches, (rows, columns) = table.shape[1] - 1, own
    if known is not None:
        return known if known[0] * known[1] == patches else None
    side = round(patches**0.5)
    fits = rows * columns == patches
    if side**2 == patches:
        # The grid is a square, unless the table is exactly that of the model's grid.
        is_own = fits and rows != columns and table.shape[2] % 4 == 0 and is_sincos(table, own)
        return own if is_own else (side, side)
    return own if fits else None
