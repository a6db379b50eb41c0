"""`mae-scale segment`: UperNet, from weights or from scratch (paper Table 5, Appendix A.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mae_scale.config.sections import given
from mae_scale.config.segment import SegmentConfig
from mae_scale.data.annotated import AnnotatedTrainLoader, SegmentationEvalLoader
from mae_scale.data.annotated_transforms import (
    SegmentationTransform,
    normalize_padded,
)
from mae_scale.data.shards import ShardSet
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.segmenter import Segmenter, build_segmenter
from mae_scale.tasks.classification import notes
from mae_scale.tasks.dense import initial_weights, open_annotated, validation_loader
from mae_scale.tasks.validating import validation_by
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loaders import train_loader
from mae_scale.train.loop import Batch, Validation
from mae_scale.train.run import TrainingSetup
from mae_scale.train.segmentation_scores import Sliding, evaluate_segmentation
from mae_scale.world import World


def build(config: SegmentConfig, num_classes: int) -> Segmenter:
    """Build the model of a run, on the device of the context."""
    return build_segmenter(num_classes=num_classes, **given(config.model))


def trial_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of images, uint8 [B, 3, S, S], with labels that are made up."""
    return model(images.float(), torch.zeros_like(images[:, 0]))


def prepare(config: SegmentConfig, world: World) -> TrainingSetup:
    """Put together model, data, loss and validation of a run.

    Raises:
        UserError: shards, weights or settings cannot be used.
    """
    if config.train.micro_batch_size * world.size < 2:
        raise UserError(
            "train.micro_batch_size 1 on one process is too little for the batch norm of a map of "
            "one pixel; 2 would do, or 2 processes"
        )
    shards = open_annotated(config.data.train, config.data.cache_dir, "segment")
    low, high = config.augment.scale
    transform = SegmentationTransform(
        (low, high), config.augment.most_of_one, config.augment.colors
    )
    loader = train_loader(config, world, shards, transform, AnnotatedTrainLoader)
    with torch.device("meta"):  # without weights, which `train` makes later
        model = build(config, len(shards.classes))

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        return engine(normalize_padded(batch["image"], batch["size"]), batch["segmentation"])

    return TrainingSetup(
        "segment",
        model,
        shards,
        loader,
        loss_of,
        trial_loss,
        weights=initial_weights(config, model),
        validation=_validation(config, world, shards),
        notes=notes(shards.classes),
    )


def sliding_of(config: SegmentConfig) -> Sliding:
    """Return the windows by which a run segments whole images."""
    size = config.model.img_size
    return Sliding(size, config.train.validate_stride or max(1, size * 2 // 3))


def _validation(config: SegmentConfig, world: World, train: ShardSet) -> Validation | None:
    """Make the validation that computes mIoU, mean accuracy and pixel accuracy on data.val.

    Returns:
        The validation; None: there is no data.val.

    Raises:
        UserError: there are no shards, or their classes are not those of the training shards.
    """
    if config.data.val is None:
        return None
    shards = open_annotated(config.data.val, config.data.cache_dir, "segment")
    if shards.classes != train.classes:
        raise UserError(
            f"data.val {shards.root} has {len(shards.classes)} classes that are not the "
            f"{len(train.classes)} of data.train; their manifests must list the same"
        )
    loader = validation_loader(SegmentationEvalLoader, config, world, shards, 1)

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
