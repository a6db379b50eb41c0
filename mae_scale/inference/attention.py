"""Drawing the attention of the class token, for `mae-scale attention`."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from mae_scale.inference.images import find_images, read_centre, shown, write_png
from mae_scale.inference.model import chosen_model
from mae_scale.inference.pictures import Pixels, rows_of_images
from mae_scale.models.attention import class_attention
from mae_scale.world import World

log = logging.getLogger("mae_scale")

_COLOURS = matplotlib.colormaps["inferno"]  # from black through red to bright yellow
_COLOUR = 0.65  # share of the colour in a map; the rest is the image in gray


def run(options: argparse.Namespace, world: World) -> None:
    """Draw a row for each image: the image, the mean of all heads, and each head.

    Args:
        options: arguments of `mae-scale attention`.
        world: this process, whose device is used.

    Raises:
        UserError: the weights or an image cannot be used.
    """
    files = find_images(options.images, options.most)
    found = chosen_model(options, "encoder")
    found.put(world.device)
    limit = options.max_pixels or found.max_pixels
    rows = []
    for file, _ in files:
        image = read_centre(file, found.size, limit, found.bands, found.crop_ratio)
        inputs = found.bands.normalize(image[None].to(world.device))
        shares = class_attention(found.model, inputs)[0].cpu()
        pixels = shown(image)
        row: list[Any] = [(pixels, file.name, None)]
        for head in (shares.mean(dim=0), *shares):
            row.append((_over(pixels, head), f"bright: {100 * head.max():.2g} %", None))
        rows.append(row)
    heads = [f"head {number + 1}" for number in range(len(rows[0]) - 2)]
    write_png(options.out, rows_of_images(rows, ["image", "mean of the heads", *heads]))
    log.info("wrote %s: %d images, %d heads", options.out, len(rows), len(heads))


def _over(pixels: Pixels, shares: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Colour an image by the attention to its patches; the largest share is the brightest.

    Args:
        pixels: uint8 [H, W, 3].
        shares: float32 [rows, columns].
    """
    scaled = F.interpolate(
        (shares / shares.max())[None, None], pixels.shape[:2], mode="bilinear", align_corners=False
    )[0, 0]
    colours = _COLOURS(scaled.numpy())[..., :3] * 255
    gray = pixels.mean(axis=-1, keepdims=True)
    return np.round(_COLOUR * colours + (1 - _COLOUR) * gray).astype(np.uint8)
