"""`mae-scale finetune`: classification, from weights or from scratch (paper Tables 9 and 11)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from timm.data import Mixup
from torch.nn import functional as F

from mae_scale.config.classification import AugmentConfig, FinetuneConfig
from mae_scale.config.sections import given
from mae_scale.data.augment import Augment
from mae_scale.data.bands import Bands
from mae_scale.data.shards import ShardSet
from mae_scale.errors import UserError
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.planning.flops import classifier_training_flops as flops
from mae_scale.randomness import Purpose, hash64
from mae_scale.tasks.classification import classes_of, initial_weights, notes, validation
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import TrainingSetup, training_data
from mae_scale.world import World

__all__ = ["build", "flops", "prepare"]


def build(config: FinetuneConfig, num_classes: int) -> Classifier:
    """Build the model of a run, frozen as `train.tune_blocks` says."""
    model = build_classifier(num_classes=num_classes, **given(config.model, "crop_ratio"))
    if config.train.tune_blocks is not None:
        model.tune_last(config.train.tune_blocks)
    return model


def prepare(config: FinetuneConfig, world: World) -> TrainingSetup:
    """Put together what is trained.

    Raises:
        UserError: shards, weights or settings that cannot be used.
    """
    shards, loader = training_data(config, world, Augment.of(config.augment))
    classes = classes_of(shards)
    with torch.device("meta"):  # no weights yet
        model = build(config, len(classes))
    target = Targets(config.augment, len(classes), config.train.micro_batch_size)
    bands = Bands.of(config)
    weight = class_weights(config.train.class_weights, shards)
    if weight is not None:
        weight = weight.to(world.device)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        key = int(hash64(Purpose.MIX, config.seed, step, world.rank, micro))
        image, label = target.mix(bands.normalize(batch["image"]), batch["label"], key)
        return F.cross_entropy(engine(image), label, weight)

    return TrainingSetup(
        "finetune",
        model,
        shards,
        loader,
        loss_of,
        flops(model),
        weights=initial_weights(config.weights, model, config.new_head),
        validation=validation(config, world, shards),
        notes=notes(classes),
    )


def class_weights(
    asked: Literal["balanced"] | list[float] | None, shards: ShardSet
) -> torch.Tensor | None:
    """The weight of each class in the loss, float32 [classes]; None: all 1.

    Under "balanced" it is the mean number of images of a class over its own number, so that the
    mean over all images is 1. A class without images gets 0.

    Raises:
        UserError: a list of another length than the classes, or of nothing but 0.
    """
    if asked is None:
        return None
    classes = len(shards.classes)
    if asked == "balanced":
        counts = np.bincount(shards.index["label"], minlength=classes)
        mean = len(shards) / np.count_nonzero(counts)
        return torch.tensor([mean / n if n else 0.0 for n in counts], dtype=torch.float32)
    if len(asked) != classes or not any(asked):
        raise UserError(
            f"train.class_weights has {len(asked)} values; expected one for each of the {classes} "
            f"classes of {shards.root}, not all of them 0"
        )
    return torch.tensor(asked, dtype=torch.float32)


class Targets:
    """Labels as distributions over the classes: mixup, cutmix and label smoothing, timm's.

    Mixing is within the micro-batch, with its mirror image.

    Args:
        augment: the config's section.
        classes: number of them.
        micro_batch_size: must be even to be mixed.

    Raises:
        UserError: a micro-batch that cannot be mixed.
    """

    def __init__(self, augment: AugmentConfig, classes: int, micro_batch_size: int) -> None:
        mixes = augment.mixes
        if mixes and micro_batch_size % 2:
            raise UserError(
                f"train.micro_batch_size {micro_batch_size} must be even: mixup and cutmix mix "
                "pairs (--augment.mixup 0 --augment.cutmix 0 does without)"
            )
        self._mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            label_smoothing=augment.label_smoothing,
            num_classes=classes,
            prob=1.0 if mixes else 0.0,
        )
        self._mixup.mixup_enabled = mixes

    def mix(
        self, images: torch.Tensor, labels: torch.Tensor, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a micro-batch in place, deciding how by the key alone.

        Args:
            images: float32 [b, 3, S, S].
            labels: int64 [b].
            key: 64 random bits.

        Returns:
            images: the same tensor.
            targets: float32 [b, classes], each row summing to 1.
        """
        if not self._mixup.mixup_enabled:  # it would ask for an even number
            classes, smoothing = self._mixup.num_classes, self._mixup.label_smoothing
            return images, F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
        np.random.seed(key & 0xFFFFFFFF)  # all that it draws from
        return self._mixup(images, labels)
