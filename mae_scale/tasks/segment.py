"""`mae-scale segment`: UperNet, from weights or from scratch (paper Table 5, Appendix A.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_scale.config.sections import given
from mae_scale.config.segment import SegmentConfig
from mae_scale.data.annotated import AnnotatedTrainLoader, SegmentationEvalLoader
from mae_scale.data.annotated_transforms import (
    SegmentationTransform,
    normalize_padded,
)
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.dense_weights import fit_to_dense_model
from mae_scale.models.segmenter import Segmenter, build_segmenter
from mae_scale.tasks.classification import notes
from mae_scale.tasks.summary import fitted
from mae_scale.tasks.trained import read_any
from mae_scale.tasks.validating import validation_by
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch, Validation
from mae_scale.train.run import TrainingSetup, train_loader
from mae_scale.train.segmentation_scores import Sliding, evaluate_segmentation
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def build(config: SegmentConfig, num_classes: int) -> Segmenter:
    """Build the model of a run."""
    return build_segmenter(num_classes=num_classes, **given(config.model))


def flops(model: Segmenter) -> int:
    """Operations of one image in a training step, counted by PyTorch on the model's device.

    The backward pass counts twice the forward one.
    """
    was_training, size = model.training, model.img_size
    model.eval()
    images = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.neck(model.backbone(images))
        model.head(maps)
        model.auxiliary(maps[2])
    model.train(was_training)
    return 3 * counter.get_total_flops()


def prepare(config: SegmentConfig, world: World) -> TrainingSetup:
    """Put together what is trained.

    Raises:
        UserError: shards, weights or settings that cannot be used.
    """
    if config.train.micro_batch_size * world.size < 2:
        raise UserError(
            "train.micro_batch_size 1 on one process is too little for the batch norm of a map of "
            "one pixel; 2 would do, or 2 processes"
        )
    shards = open_segmentation(config.data.train, config.data.cache_dir)
    low, high = config.augment.scale
    transform = SegmentationTransform(
        (low, high), config.augment.most_of_one, config.augment.colors
    )
    loader = train_loader(config, world, shards, transform, AnnotatedTrainLoader)
    with torch.device("meta"):  # no weights yet
        model = build(config, len(shards.classes))

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        return engine(normalize_padded(batch["image"], batch["size"]), batch["segmentation"])

    return TrainingSetup(
        "segment",
        model,
        shards,
        loader,
        loss_of,
        flops(model),
        weights=_initial_weights(config, model),
        validation=_validation(config, world, shards),
        notes=notes(shards.classes),
    )


def open_segmentation(path: str, cache_dir: str | None) -> ShardSet:
    """Open shards with the class of each pixel.

    Raises:
        UserError: there are none, or they hold something else.
    """
    shards = open_shards(path, cache_dir)
    if shards.task != "segmentation":
        raise UserError(
            f"{shards.root} holds shards for {shards.task}; segment needs those that `mae-scale "
            "shard` makes of ADE20K's layout"
        )
    return shards


def sliding_of(config: SegmentConfig) -> Sliding:
    """Say how a run segments whole images."""
    size = config.model.img_size
    return Sliding(size, config.train.validate_stride or max(1, size * 2 // 3))


def _initial_weights(
    config: SegmentConfig, model: Segmenter
) -> Callable[[], dict[str, torch.Tensor]] | None:
    if config.weights is None:
        return None
    path = Path(config.weights)

    def read() -> dict[str, torch.Tensor]:
        state = read_any(path)
        weights = fit_to_dense_model(state, model, new_head=config.new_head)
        log.info("from %s: %s", path, fitted(state, weights, model))
        return weights

    return read


def _validation(config: SegmentConfig, world: World, train: ShardSet) -> Validation | None:
    """MIoU, mean accuracy and pixel accuracy on data.val.

    Raises:
        UserError: no shards, or their classes are not those of the training shards.
    """
    if config.data.val is None:
        return None
    shards = open_segmentation(config.data.val, config.data.cache_dir)
    if shards.classes != train.classes:
        raise UserError(
            f"data.val {shards.root} has {len(shards.classes)} classes that are not the "
            f"{len(train.classes)} of data.train; their manifests must list the same"
        )
    loader = SegmentationEvalLoader(
        shards,
        img_size=config.model.img_size,
        batch_size=1,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.worker_processes,
        cache_dir=config.data.cache_dir,
        cache_bytes=int(config.data.cache_gb * 1e9),
        max_pixels=config.data.max_pixels,
    )

    def scores(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        found = evaluate_segmentation(
            engine,
            loader,
            sliding_of(config),
            classes=len(train.classes),
            device=world.device,
            doing=watchdog.doing,
            what="validating",
            stop=stop,
        )
        return None if found is None else found.row()

    return validation_by(config, config.train.validate_epochs, scores)
