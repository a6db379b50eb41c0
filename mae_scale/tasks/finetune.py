"""`mae-scale finetune`: classification, from weights or from scratch (paper Tables 9 and 11)."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from torch.nn import functional as F

from mae_scale.config.parsing import parse
from mae_scale.config.sections import AugmentConfig, FinetuneConfig
from mae_scale.data.augment import Augment
from mae_scale.data.transforms import normalize
from mae_scale.errors import UserError
from mae_scale.launch.logs import set_up_logging
from mae_scale.models.classifier import build_classifier
from mae_scale.planning.flops import classifier_training_flops
from mae_scale.randomness import Purpose, hash64
from mae_scale.tasks.classification import classes_of, initial_weights, notes, validation
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import Parts, deepspeed_config, train, training_data
from mae_scale.world import World


def main(argv: list[str], prog: str) -> int:
    """Parse the config, train, and give the exit code: 0 finished, 85 stopped early."""
    config = parse(FinetuneConfig, argv, prog)
    world = World.from_environment()
    set_up_logging(world)
    return finetune(config, world)


def finetune(config: FinetuneConfig, world: World) -> int:
    """Train until the end or a signal. What can be wrong is looked at before anything is made."""
    check_numbers(config)
    ds_config = deepspeed_config(config, world)
    wanted = config.augment
    augment = Augment(wanted.crop_scale, True, wanted.rand_augment, wanted.erasing)
    shards, loader = training_data(config, world, augment)
    classes = classes_of(shards)
    with torch.device("meta"):  # no weights yet
        model = build_classifier(num_classes=len(classes), **config.model.build_kwargs())
    if config.train.tune_blocks is not None:
        model.tune_last(config.train.tune_blocks)
    target = Targets(wanted, len(classes), config.train.micro_batch_size)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        key = int(hash64(Purpose.MIX, config.seed, step, world.rank, micro))
        image, label = target.mix(normalize(batch["image"]), batch["label"], key)
        return F.cross_entropy(engine(image), label)

    parts = Parts(
        "finetune",
        model,
        shards,
        loader,
        loss_of,
        classifier_training_flops(model),
        weights=initial_weights(config.weights, model, config.new_head),
        validation=validation(config, world, shards, with_ema=config.optim.ema_decay is not None),
        notes=notes(classes),
    )
    return train(config, world, ds_config, parts)


def check_numbers(config: FinetuneConfig) -> None:
    """Raise a UserError for a number that cannot be."""
    if not 0 < config.optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay {config.optim.layer_decay} must lie in 0 to 1, not 0")
    ema = config.optim.ema_decay
    if ema is not None and not 0 <= ema < 1:
        raise UserError(f"optim.ema_decay {ema} must lie in 0 to 1, 1 excluded")


class Targets:
    """Labels as distributions over the classes: mixup, cutmix and label smoothing, timm's.

    Mixing is within the micro-batch, with its mirror image.

    Args:
        augment: the config's section.
        classes: number of them.
        micro_batch_size: must be even to be mixed.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(self, augment: AugmentConfig, classes: int, micro_batch_size: int) -> None:
        smoothing = augment.label_smoothing
        if not 0 <= smoothing < 1 or min(augment.mixup, augment.cutmix) < 0:
            raise UserError(
                f"augment.label_smoothing {smoothing} must lie in 0 to 1, augment.mixup "
                f"{augment.mixup} and augment.cutmix {augment.cutmix} must be at least 0"
            )
        mixes = augment.mixup > 0 or augment.cutmix > 0
        if mixes and micro_batch_size % 2:
            raise UserError(
                f"train.micro_batch_size {micro_batch_size} must be even: mixup and cutmix mix "
                "pairs (--augment.mixup 0 --augment.cutmix 0 does without)"
            )
        self._mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            label_smoothing=smoothing,
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
