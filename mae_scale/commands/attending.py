"""Drawing the attention of the class token, for `mae-scale attention`."""

from __future__ import annotations

import argparse
import io
import logging
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from mae_scale.commands.drawing import Pixels, rows_of_images
from mae_scale.commands.reconstructing import choose_images, read_centre
from mae_scale.data.bands import for_display
from mae_scale.data.transforms import default_crop_ratio
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.models.attention import class_attention
from mae_scale.tasks.encoders import read_describer
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
        UserError: the weights or an image cannot be used, or an option is out of its range.
    """
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} must end in .png")
    for name in ("most", "max_pixels"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    files = choose_images(options.images, options.most)
    encoder = read_describer(
        options.weights, name=options.model, img_size=options.img_size, ema=options.ema
    )
    model, size = encoder.model.to(world.device), encoder.model.patch_embed.img_size
    ratio, limit = (
        encoder.crop_ratio or default_crop_ratio(size),
        options.max_pixels or encoder.max_pixels,
    )
    rows = []
    for file in files:
        image = read_centre(file, size, limit, encoder.bands, ratio)[None]
        shares = class_attention(model, encoder.bands.normalize(image.to(world.device)))[0].cpu()
        pixels = for_display(image)[0].permute(1, 2, 0).numpy()
        row: list[Any] = [(pixels, file.name, None)]
        for head in (shares.mean(dim=0), *shares):
            row.append((_over(pixels, head), f"bright: {100 * head.max():.2g} %", None))
        rows.append(row)
    heads = [f"head {number + 1}" for number in range(len(rows[0]) - 2)]
    picture = rows_of_images(rows, ["image", "mean of the heads", *heads])
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, stream.getvalue())
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
