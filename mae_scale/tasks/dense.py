"""The code that detection and segmentation share: shards, weights to start from, loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from mae_scale.config.dense import DenseConfig
from mae_scale.data.bands import Bands
from mae_scale.data.loader import EvalLoader
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.models.dense_weights import fit_to_dense_model
from mae_scale.tasks.summary import fitted
from mae_scale.tasks.trained import read_any, warn_of_other_bands
from mae_scale.train.loaders import common_to_loaders
from mae_scale.world import World

log = logging.getLogger("mae_scale")

Loader = TypeVar("Loader", bound=EvalLoader)
# Kind of the shards, and the layout they are made of, by task.
_SHARDS = {"detect": ("detection", "a COCO folder"), "segment": ("segmentation", "ADE20K's layout")}


def open_annotated(path: str, cache_dir: str | None, task: str) -> ShardSet:
    """Open shards with annotations.

    Args:
        path: folder of the shards.
        cache_dir: folder into which remote shards are staged.
        task: "detect" or "segment".

    Raises:
        UserError: there are no shards, or they are not of the kind that the task needs.
    """
    shards = open_shards(path, cache_dir)
    kind, layout = _SHARDS[task]
    if shards.task != kind:
        raise UserError(
            f"{shards.root} holds shards for {shards.task}; {task} needs those that `mae-scale "
            f"shard` makes of {layout}"
        )
    return shards


def initial_weights(
    config: DenseConfig, model: Any
) -> Callable[[], dict[str, torch.Tensor]] | None:
    """Return a function that reads the weights to start from; None: training starts from scratch.

    Args:
        config: config of the run.
        model: `Detector` or `Segmenter` that gets them; it may be on the meta device.
    """
    if config.weights is None:
        return None
    path = Path(config.weights)

    def read() -> dict[str, torch.Tensor]:
        state = read_any(path, model)
        warn_of_other_bands(path, state, Bands.of(config))
        weights = fit_to_dense_model(state, model, new_head=config.new_head)
        log.info("from %s: %s", path, fitted(state, weights, model))
        return weights

    return read


def validation_loader(
    kind: type[Loader], config: DenseConfig, world: World, shards: ShardSet, batch_size: int
) -> Loader:
    """Make the loader of this rank's part of the validation set, with each image once.

    Args:
        kind: class of the loader.
        config: config of the run.
        world: this process among the others.
        shards: shards of data.val.
        batch_size: images of a batch.
    """
    return kind(shards, batch_size=batch_size, **common_to_loaders(config, world))
