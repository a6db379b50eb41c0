"""`mae-scale linprobe`: a linear classifier on a frozen encoder (paper Table 10)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from mae_scale.config.deepspeed import check_lars
from mae_scale.config.parsing import parse
from mae_scale.config.sections import LinprobeConfig
from mae_scale.data.augment import Augment
from mae_scale.data.transforms import normalize
from mae_scale.launch.logs import set_up_logging
from mae_scale.models.classifier import build_classifier
from mae_scale.planning.flops import classifier_training_flops
from mae_scale.tasks.classification import classes_of, initial_weights, notes, validation
from mae_scale.train.deepspeed_config import zero_stage
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import Parts, deepspeed_config, train, training_data
from mae_scale.world import World


def main(argv: list[str], prog: str) -> int:
    """Parse the config, train, and give the exit code: 0 finished, 85 stopped early."""
    config = parse(LinprobeConfig, argv, prog)
    world = World.from_environment()
    set_up_logging(world)
    return linprobe(config, world)


def linprobe(config: LinprobeConfig, world: World) -> int:
    """Train until the end or a signal. What can be wrong is looked at before anything is made."""
    ds_config = deepspeed_config(config, world)
    check_lars(zero_stage(ds_config))
    shards, loader = training_data(config, world, Augment(config.augment.crop_scale))
    classes = classes_of(shards)
    with torch.device("meta"):  # no weights yet
        model = build_classifier(num_classes=len(classes), **config.model.build_kwargs())
    model.tune_last(0)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        logits = engine(normalize(batch["image"]))
        # Each rank has seen images of its own. A rank's statistics must not be its own: rank 0's
        # are saved.
        for statistics in engine.module.buffers():
            if statistics.is_floating_point() and world.size > 1:
                dist.all_reduce(statistics)
                statistics /= world.size
        return F.cross_entropy(logits, batch["label"])

    parts = Parts(
        "linprobe",
        model,
        shards,
        loader,
        loss_of,
        classifier_training_flops(model),
        # The probe's head is new, whatever head the weights may bring.
        weights=initial_weights(config.weights, model, new_head=True),
        validation=validation(config, world, shards),
        notes=notes(classes),
    )
    return train(config, world, ds_config, parts)
