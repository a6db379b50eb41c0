"""`mae-scale finetune`: classification, from weights or from scratch (paper Tables 9 and 11)."""

from __future__ import annotations

from typing import Any, Literal

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
from mae_scale.randomness import Purpose, hash64
from mae_scale.tasks.classification import classes_of, initial_weights, notes, validation
from mae_scale.tasks.first_batch import FirstBatch
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import TrainingSetup, training_data
from mae_scale.world import World


def build(config: FinetuneConfig, num_classes: int) -> Classifier:
    """Build the model of a run, on the device of the context, frozen as `train.tune_blocks` says.

    Args:
        config: config of the run.
        num_classes: number of outputs.
    """
    model = build_classifier(num_classes=num_classes, **given(config.model, "crop_ratio"))
    if config.train.tune_blocks is not None:
        model.tune_last(config.train.tune_blocks)
    return model


def trial_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of images, uint8 [B, C, H, W], with made-up shares of the classes."""
    logits = model(images.float())
    return F.cross_entropy(logits, torch.rand_like(logits))


def prepare(config: FinetuneConfig, world: World) -> TrainingSetup:
    """Put together model, data, loss and validation of a run.

    Raises:
        UserError: shards, weights or settings cannot be used.
    """
    shards, loader = training_data(config, world, Augment.of(config.augment))
    classes = classes_of(shards)
    with torch.device("meta"):  # without weights, which `train` makes later
        model = build(config, len(classes))
    target = Targets(config.augment, len(classes), config.train.micro_batch_size)
    bands, first = Bands.of(config), FirstBatch.of(config, world, classes)
    weight = class_weights(config.train.class_weights, shards)
    if weight is not None:
        weight = weight.to(world.device)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        key = int(hash64(Purpose.MIX, config.seed, step, world.rank, micro))
        image, label = target.mix(bands.normalize(batch["image"]), batch["label"], key)
        first.draw(step, micro, image, label)
        return F.cross_entropy(engine(image), label, weight)

    return TrainingSetup(
        "finetune",
        model,
        shards,
        loader,
        loss_of,
        trial_loss,
        weights=initial_weights(config, model, config.new_head),
        validation=validation(config, world, shards),
        notes=notes(classes),
    )


def class_weights(
    asked: Literal["balanced"] | list[float] | None, shards: ShardSet
) -> torch.Tensor | None:
    """Return the weight of each class in the loss, float32 [classes]; None: all weights are 1.

    Under "balanced" the weight of a class is the mean number of images of a class divided by the
    number of images of this class, so that the mean weight of all images is 1. A class without
    images gets 0.

    Args:
        asked: `train.class_weights` of the config.
        shards: training shards.

    Raises:
        UserError: the list has not one value for each class, or all its values are 0.
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
    """Turns labels into distributions over the classes, by timm's mixup, cutmix and smoothing.

    Each image of a micro-batch is mixed with its counterpart from the other end.

    Args:
        augment: section `augment` of the config.
        classes: number of classes.
        micro_batch_size: images of a micro-batch; it must be even if images are mixed.

    Raises:
        UserError: the micro-batch cannot be mixed.
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
        """Mix the images of a micro-batch in place; the key alone decides how.

        Args:
            images: float32 [b, C, H, W].
            labels: int64 [b].
            key: 64 random bits.

        Returns:
            images: the same tensor.
            targets: float32 [b, classes]; each row sums to 1.
        """
        if not self._mixup.mixup_enabled:  # timm would demand an even number of images
            classes, smoothing = self._mixup.num_classes, self._mixup.label_smoothing
            return images, F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
        np.random.seed(key & 0xFFFFFFFF)  # timm draws from this generator only
        return self._mixup(images, labels)
