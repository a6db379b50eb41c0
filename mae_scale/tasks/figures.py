"""Reconstructions as PNG, in the manner of paper Figure 2.

Files appear whole or not at all. matplotlib is used through its objects, so that no display is
needed and no state is shared with the caller's own figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mae_scale.data.bands import for_display
from mae_scale.files import as_utf8, write_atomically

# Note under the title, since the third column is puzzling without it.
NOTE = (
    "Only hidden patches count in the loss: what the third column shows in the places of visible",
    "ones means nothing. The last column has the visible patches themselves there.",
)
COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")
_DPI = 100
_MIN_TILE = 160  # pixels; smaller images are enlarged by a whole factor, so that pixels stay square
_GREY = 0.5
_TEXT = "#222222"


def save_reconstruction_grid(
    path: str | Path,
    images: torch.Tensor,
    mask: torch.Tensor,
    reconstruction: torch.Tensor,
    *,
    title: str = "",
    captions: Sequence[str] | None = None,
) -> None:
    """Write a PNG with four tiles per image: the columns of `COLUMNS`.

    Many images stand in several groups of four columns side by side, so that the picture stays
    near a page's proportions.

    Args:
        path: PNG to write or replace.
        images: float [N, C, H, W] in [0, 1] (values outside are clipped), on any device.
        mask: [N, 1, H, W], 1 on removed pixels, 0 on visible ones.
        reconstruction: the model's images, in shape and range as `images`.
        title: one line above everything.
        captions: a line for each image, such as its file name.
    """
    originals, removed, predicted = (_pixels(x) for x in (images, mask, reconstruction))
    masked = np.where(removed > 0.5, _GREY, originals)
    pasted = np.where(removed > 0.5, predicted, originals)
    if originals.shape[-1] == 1:  # gray
        originals, masked, predicted, pasted = (
            x.repeat(3, axis=-1) for x in (originals, masked, predicted, pasted)
        )
    tiles = np.stack([originals, masked, predicted, pasted], axis=1)  # [N, 4, H, W, 3]
    zoom = math.ceil(_MIN_TILE / tiles.shape[-2])
    tiles = np.round(tiles * 255).astype(np.uint8).repeat(zoom, axis=2).repeat(zoom, axis=3)

    n, _, height, width, _ = tiles.shape
    groups = math.ceil(math.sqrt(n / 8))
    rows = math.ceil(n / groups)
    gap, margin = 6, 16
    group_gap = 4 * gap
    caption_height = 20 if captions else 0
    header = 30 + (32 + 15 * len(NOTE) if title else 0)
    group_width = 4 * width + 3 * gap
    row_height = height + gap + caption_height
    canvas_height = header + rows * row_height + margin - gap
    canvas_width = 2 * margin + groups * group_width + (groups - 1) * group_gap
    canvas = np.full((canvas_height, canvas_width, 3), 255, np.uint8)
    figure = Figure(figsize=(canvas_width / _DPI, canvas_height / _DPI), dpi=_DPI)

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        x, y = x / canvas_width, 1 - y / canvas_height
        text = as_utf8(text).decode()
        figure.text(x, y, text, fontsize=size, color=_TEXT, parse_math=False, **style)

    if title:
        write(margin, 26, title, 12, ha="left", va="baseline", weight="bold")
        for number, line in enumerate(NOTE):
            write(margin, 44 + 15 * number, line, 7, ha="left", va="baseline")
    for i, four in enumerate(tiles):
        group, row = divmod(i, rows)
        left = margin + group * (group_width + group_gap)
        top = header + row * row_height
        for column, tile in enumerate(four):
            x = left + column * (width + gap)
            canvas[top : top + height, x : x + width] = tile
            if row == 0:
                write(x + width / 2, header - 10, COLUMNS[column], 10, ha="center", va="baseline")
        if captions:
            longest = group_width // 7
            text = captions[i]
            text = text if len(text) <= longest else "…" + text[1 - longest :]
            write(left, top + height + 14, text, 8, ha="left", va="baseline")
    figure.figimage(canvas)
    _save(figure, path)


def _pixels(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """Turn [N, C, H, W] on any device into [N, H, W, 1 or 3] in [0, 1], with three bands to show.

    A mask, which has one channel, keeps it.
    """
    x = x if x.shape[1] == 1 else for_display(x)
    return x.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    write_atomically(path, stream.getvalue())
