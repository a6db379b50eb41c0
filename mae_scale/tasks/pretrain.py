"""`mae-scale pretrain`: train a masked autoencoder (paper section 3, Table 8)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from mae_scale.config import PretrainConfig, parse
from mae_scale.data.transforms import normalize
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.flops import training_flops
from mae_scale.models.masking import mask_noise
from mae_scale.models.weights import fit_to_mae
from mae_scale.tasks.classification import read_any
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.logs import set_up_logging
from mae_scale.train.loop import Batch
from mae_scale.train.run import Parts, deepspeed_config, train, training_data
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def main(argv: list[str], prog: str) -> int:
    """Parse the config, train, and give the exit code: 0 finished, 85 stopped early."""
    config = parse(PretrainConfig, argv, prog)
    world = World.from_environment()
    set_up_logging(world)
    return pretrain(config, world)


def pretrain(config: PretrainConfig, world: World) -> int:
    """Train until the end or a signal. What can be wrong is looked at before anything is made."""
    ds_config = deepspeed_config(config, world)
    shards, loader = training_data(config, world)
    with torch.device("meta"):  # no weights yet
        model = build_mae(**config.model.build_kwargs())

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        image, epoch, sample = batch["image"], batch["epoch"], batch["sample"]
        noise = mask_noise(config.seed, epoch, sample, model.num_patches)
        loss, _, _ = engine(normalize(image), noise)
        return loss

    parts = Parts(
        model,
        shards,
        loader,
        loss_of,
        training_flops(model),
        weights=initial_weights(config.weights, model),
    )
    return train(config, world, ds_config, parts)


def initial_weights(
    spec: str | None, model: MaskedAutoencoderViT
) -> Callable[[], dict[str, torch.Tensor]] | None:
    """A function that reads the weights to start from; None: from scratch."""
    if spec is None:
        return None

    def read() -> dict[str, torch.Tensor]:
        weights = fit_to_mae(read_any(Path(spec)), model)
        if "decoder_pred.weight" not in weights:
            log.warning("%s has no decoder: training starts with a new one", spec)
        return weights

    return read
