"""`mae-scale pretrain`: train a masked autoencoder (paper section 3, Table 8)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from mae_scale.config.parsing import parse
from mae_scale.config.sections import PretrainConfig
from mae_scale.data.augment import Augment
from mae_scale.data.transforms import normalize
from mae_scale.errors import UserError
from mae_scale.launch.logs import set_up_logging
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.targets import PatchPCA, patchify
from mae_scale.models.tokenizer import Tokenizer
from mae_scale.models.weights import fit_to_mae
from mae_scale.planning.flops import training_flops
from mae_scale.tasks.classification import read_any
from mae_scale.tasks.pictures import reconstructions
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch
from mae_scale.train.run import Parts, deepspeed_config, train, training_data
from mae_scale.world import World

log = logging.getLogger("mae_scale")

PCA_IMAGES = 2048  # whose patches decide the components


def main(argv: list[str], prog: str) -> int:
    """Parse the config, train, and give the exit code: 0 finished, 85 stopped early."""
    config = parse(PretrainConfig, argv, prog)
    world = World.from_environment()
    set_up_logging(world)
    return pretrain(config, world)


def pretrain(config: PretrainConfig, world: World) -> int:
    """Train until the end or a signal. What can be wrong is looked at before anything is made."""
    ds_config = deepspeed_config(config, world)
    shards, loader = training_data(config, world, augmentation(config))
    with torch.device("meta"):  # no weights yet
        model = build_mae(**config.model.build_kwargs())
    token_ids = tokenizer(config, model, world)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        image = batch["image"]
        noise = model.noise(config.seed, batch["epoch"], batch["sample"])
        loss, _, _ = engine(normalize(image), noise, token_ids=token_ids and token_ids(image))
        return loss

    parts = Parts(
        "pretrain",
        model,
        shards,
        loader,
        loss_of,
        training_flops(model),
        weights=initial_weights(config, model),
        # A tokenizer's ids are no pixels.
        pictures=None if model.target == "tokens" else reconstructions(config, shards),
    )
    return train(config, world, ds_config, parts)


def augmentation(config: PretrainConfig) -> Augment:
    """What makes the images vary (paper Table 1e)."""
    wanted = config.augment
    return Augment(wanted.crop_scale, crop=wanted.crop, color_jitter=wanted.color_jitter)


def tokenizer(
    config: PretrainConfig, model: MaskedAutoencoderViT, world: World
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What gives the target's ids (paper Table 1d); None for another target.

    Raises:
        UserError: the file is missing or does not fit, or it is not asked for.
    """
    section = config.model
    if (section.target == "tokens") != (section.tokenizer is not None):
        raise UserError(
            f"model.target {section.target} with model.tokenizer {section.tokenizer}: the target "
            "tokens, and no other, needs the file of a tokenizer"
        )
    if section.tokenizer is None:
        return None
    sizes = (section.img_size, model.num_patches, section.vocabulary_size)
    return Tokenizer(section.tokenizer, *sizes).to(world.device)


def pca_state(config: PretrainConfig, patch_size: int) -> dict[str, torch.Tensor]:
    """Mean and components of the patches of the run's first images, by the model's keys.

    They follow from the config alone; rank 0 computes them when a run starts, and then they are
    in its checkpoints.
    """
    _, loader = training_data(config, World(), augmentation(config))

    def patches() -> Iterator[torch.Tensor]:
        batches = -(-PCA_IMAGES // config.train.micro_batch_size)
        for batch in islice(loader.batches(0), batches):
            yield patchify(normalize(batch["image"]), patch_size).flatten(0, 1)

    with closing(loader):
        state = PatchPCA.state_from(patches(), config.model.pca_components)
    return {f"pca.{key}": value for key, value in state.items()}


def initial_weights(
    config: PretrainConfig, model: MaskedAutoencoderViT
) -> Callable[[], dict[str, torch.Tensor]] | None:
    """A function that reads or computes what does not start fresh; None: all does."""
    spec = config.weights
    if spec is None and model.target != "pca":
        return None

    def read() -> dict[str, torch.Tensor]:
        weights = {} if spec is None else fit_to_mae(read_any(Path(spec)), model)
        if weights and "decoder_pred.weight" not in weights:
            log.warning("%s has no decoder: training starts with a new one", spec)
        if model.target == "pca":
            weights |= pca_state(config, model.patch_size)
        return weights

    return read
