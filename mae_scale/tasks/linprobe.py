"""`mae-scale linprobe`: a linear classifier on a frozen encoder (paper Table 10)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import functional as F

from mae_scale.config.batch import peak_rate, total_steps
from mae_scale.config.classification import LinprobeConfig
from mae_scale.config.sections import given
from mae_scale.data.augment import Augment
from mae_scale.data.bands import Bands
from mae_scale.errors import UserError
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.tasks.classification import classes_of, initial_weights, notes, validation
from mae_scale.tasks.first_batch import FirstBatch
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import TrainingSetup, training_data
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def build(config: LinprobeConfig, num_classes: int) -> Classifier:
    """Build the model of a run, on the device of the context; only its head is trained.

    Args:
        config: config of the run.
        num_classes: number of outputs.
    """
    model = build_classifier(
        num_classes=num_classes, head="probe", **given(config.model, "crop_ratio")
    )
    model.tune_last(0)
    return model


# Sum of the learning rate over the steps on ImageNet (Table 10): 90 epochs of 78 steps, peak 6.4.
IMAGENET_BUDGET = 90 * 78 * 6.4


def warn_of_small_budget(config: LinprobeConfig, steps_per_epoch: int) -> None:
    """Warn if LARS can hardly move the weights in the steps of the run.

    The measure is the sum of the learning rate over the steps, against that on ImageNet.
    """
    steps = total_steps(config.train, steps_per_epoch)
    share = peak_rate(config) * steps / IMAGENET_BUDGET
    if share < 1 / 50:
        log.warning(
            "this probe will hardly train: its learning rate, summed over %d steps, is 1/%.0f of "
            "that on ImageNet, and LARS moves a weight by a thousandth of it; raise optim.base_lr "
            "(%g) or train.epochs (%d)",
            *(steps, 1 / max(share, 1e-9), config.optim.base_lr, config.train.epochs),
        )


def trial_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of images, uint8 [B, C, H, W], with labels that are made up."""
    logits = model(images.float())
    return F.cross_entropy(logits, images.new_zeros(len(images), dtype=torch.int64))


def prepare(config: LinprobeConfig, world: World) -> TrainingSetup:
    """Put together model, data, loss and validation of a run.

    Raises:
        UserError: shards, weights or settings cannot be used.
    """
    if config.train.micro_batch_size * world.size == 1:
        raise UserError(
            "train.micro_batch_size 1 on one process: the probe's BatchNorm needs at least 2 images"
        )
    shards, loader = training_data(config, world, Augment.of(config.augment))
    warn_of_small_budget(config, loader.steps_per_epoch)
    classes = classes_of(shards)
    with torch.device("meta"):  # without weights, which `train` makes later
        model = build(config, len(classes))
    bands, first = Bands.of(config), FirstBatch.of(config, world, classes)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        inputs = bands.normalize(batch["image"])
        first.draw(step, micro, inputs, batch["label"])
        return F.cross_entropy(engine(inputs), batch["label"])

    return TrainingSetup(
        "linprobe",
        model,
        shards,
        loader,
        loss_of,
        trial_loss,
        # The probe's head is new, whatever head the weights may bring.
        weights=initial_weights(config, model, new_head=True),
        validation=validation(config, world, shards),
        notes=notes(classes),
    )
