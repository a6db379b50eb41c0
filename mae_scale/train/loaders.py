"""Loaders as the sections of a config say."""

from __future__ import annotations

from typing import Any

from mae_scale.config.sections import RunConfig
from mae_scale.data.bands import Bands
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import ShardSet
from mae_scale.world import World


def train_loader(
    config: RunConfig,
    world: World,
    shards: ShardSet,
    augment: Any = None,
    kind: type[TrainLoader] = TrainLoader,
) -> TrainLoader:
    """Make the loader of this rank.

    Args:
        config: config of the run.
        world: processes of the run.
        shards: shards to train on.
        augment: augmentation, in the form that the loader takes.
        kind: class of the loader.

    Raises:
        UserError: there are too few samples, or the batch does not divide among the ranks.
    """
    return kind(
        shards,
        seed=config.seed,
        lanes=config.data.lanes,
        window=config.data.window,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        max_bad_fraction=config.data.max_bad_fraction,
        augment=augment,
        repeats=config.data.repeats,
        bands=Bands.of(config),
        **common_to_loaders(config, world),
    )


def common_to_loaders(config: RunConfig, world: World) -> dict[str, Any]:
    """Return the keyword arguments that the loaders of training and of evaluation share.

    Args:
        config: config of the run.
        world: this process among the others.
    """
    return {
        "img_size": config.model.img_size,
        "rank": world.rank,
        "world_size": world.size,
        "workers": config.data.worker_processes,
        "pin_memory": world.device.type == "cuda",
        "cache_dir": config.data.cache_dir,
        "cache_bytes": int(config.data.cache_gb * 1e9),
        "max_pixels": config.data.max_pixels,
    }
