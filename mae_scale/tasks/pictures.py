"""Pictures of how a model reconstructs the same few images, drawn again and again in training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from mae_scale.config.pretraining import PretrainConfig
from mae_scale.config.sizes import sides
from mae_scale.data.bands import Bands
from mae_scale.data.dataset import EvalDataset
from mae_scale.data.reader import shard_cache
from mae_scale.data.remote import is_remote
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.launch.distributed import on_rank0
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Pictures

log = logging.getLogger("mae_scale")

IMAGES = 8
_TRIES = 10  # number of images that are tried until one is not damaged

Fixed = tuple[torch.Tensor, torch.Tensor]  # global ids and pixels of the images


def reconstructions(config: PretrainConfig, train: ShardSet) -> Pictures | None:
    """Make the pictures of a run: eight images of data.val, always under the same masks.

    Without data.val the images come from the training shards. No random number of the run is used
    for them, so that training goes on as it would have without.

    Returns:
        The pictures; None: `train.reconstruct_every` is null.

    Raises:
        UserError: data.val is no shard folder.
    """
    if config.train.reconstruct_every is None:
        return None
    cache_dir = config.data.cache_dir
    shards = train if config.data.val is None else open_shards(config.data.val, cache_dir)
    cache = shard_cache(shards, cache_dir, int(config.data.cache_gb * 1e9))
    fixed: Fixed | None = None
    bands = Bands.of(config)

    def read() -> Fixed:
        dataset = EvalDataset(
            shards, config.model.img_size, 1.0, cache, max_pixels=config.data.max_pixels
        )
        dataset.bands = bands
        with closing(dataset.reader):
            return fixed_images(dataset)

    @torch.no_grad()
    def draw(engine: DeepSpeedEngine) -> Callable[[Path, str], None] | None:
        nonlocal fixed
        if fixed is None:
            fixed = on_rank0(read)
        sample, pixels = (part.to(engine.device) for part in fixed)
        if not len(sample):
            return None
        model, inputs = engine.module, bands.normalize(pixels)
        noise = model.noise(config.seed, torch.zeros_like(sample), sample)
        # The compiled blocks are for training: they would be compiled again for a batch of this
        # size.
        eager = torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
        with eager:
            reconstruction, mask = model.reconstruct(inputs, noise)
        return partial(
            _save,
            bands.denormalize(inputs),
            mask,
            bands.denormalize(reconstruction),
            sample.tolist(),
        )

    return Pictures(config.train.reconstruct_every, draw)


def fixed_images(dataset: EvalDataset) -> Fixed:
    """Read images that are spread evenly over a data set.

    In the place of a damaged image stands the next one that can be decoded. Of a remote data set
    only the first shard is read, since a shard is fetched whole.

    Returns:
        Global ids, int64 [n], and pixels, uint8 [n, C, H, W]. n is 0 where the data set cannot be
        read; a warning then says so.
    """
    shards = dataset.shards
    count = int(shards.samples[0]) if is_remote(shards.files[0]) else len(shards)
    found: dict[int, torch.Tensor] = {}
    try:
        number = min(IMAGES, count)
        for first in (i * count // number for i in range(number)):
            for sample in range(first, min(first + _TRIES, count)):
                try:
                    found.setdefault(sample, dataset.pixels(sample))
                    break
                except ValueError:  # the image is damaged; training reports it
                    continue
    except (UserError, OSError) as error:
        log.warning("reconstructions of %s are not drawn: %s", shards.root, error)
        found = {}
    size = (dataset.bands.count, *sides(dataset.img_size))
    pixels = torch.stack([*found.values()]) if found else torch.empty(0, *size, dtype=torch.uint8)
    return torch.tensor([*found], dtype=torch.int64), pixels


def _save(
    images: torch.Tensor,
    mask: torch.Tensor,
    reconstruction: torch.Tensor,
    samples: list[int],
    path: Path,
    title: str,
) -> None:
    from mae_scale.tasks.figures import (
        save_reconstruction_grid,  # matplotlib, which rank 0 alone needs
    )

    captions = [f"sample {sample}" for sample in samples]
    save_reconstruction_grid(path, images, mask, reconstruction, title=title, captions=captions)
