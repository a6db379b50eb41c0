"""Drawing what a masked autoencoder predicts for masked images, for `mae-scale reconstruct`."""

from __future__ import annotations

import argparse
import logging

import torch

from mae_scale.inference.images import find_images, read_centre
from mae_scale.inference.model import chosen_model
from mae_scale.tasks.figures import save_reconstruction_grid
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def run(options: argparse.Namespace, world: World) -> None:
    """Write the grid of original, masked, reconstruction, and reconstruction with visible patches.

    Args:
        options: arguments of `mae-scale reconstruct`.
        world: this process, whose device is used.

    Raises:
        UserError: there are no weights or no images, or an image cannot be decoded.
    """
    files = find_images(options.images, options.most)
    found = chosen_model(options, "autoencoder")
    found.put(world.device)
    mae, bands, limit = found.model, found.bands, options.max_pixels or found.max_pixels
    pixels = torch.stack([read_centre(file, found.size, limit, bands) for file, _ in files])
    number = torch.arange(len(files), device=world.device)
    noise = mae.noise(options.seed, torch.zeros_like(number), number, options.mask_ratio)
    inputs = bands.normalize(pixels.to(world.device))
    reconstruction, mask = mae.reconstruct(inputs, noise, options.mask_ratio)
    ratio = mae.mask_ratio if options.mask_ratio is None else options.mask_ratio
    save_reconstruction_grid(
        options.out,
        bands.denormalize(inputs),
        mask,
        bands.denormalize(reconstruction),
        title=f"{found.source}: {100 * ratio:g} % of the patches are hidden",
        captions=[file.name for file, _ in files],
    )
    log.info("wrote %s: %d images", options.out, len(files))
