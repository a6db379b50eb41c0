"""`mae-scale pretrain`: train a masked autoencoder (paper section 3, Table 8)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from typing import Any

import torch

from mae_scale.config.pretraining import PretrainConfig
from mae_scale.config.sections import given
from mae_scale.data.augment import Augment
from mae_scale.data.bands import Bands
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.targets import patchify
from mae_scale.models.tokenizer import Tokenizer
from mae_scale.models.weights import fit_to_mae
from mae_scale.tasks.classification import classes_of, eval_loader
from mae_scale.tasks.first_batch import FirstBatch
from mae_scale.tasks.pictures import reconstructions
from mae_scale.tasks.summary import fitted
from mae_scale.tasks.trained import grid_of, read_any, warn_of_other_bands
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.evaluation import Validation
from mae_scale.train.features import features_of
from mae_scale.train.knn import knn_scores
from mae_scale.train.linear import linear_scores
from mae_scale.train.loop import Batch
from mae_scale.train.run import TrainingSetup, training_data
from mae_scale.train.validation import Stopped
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def build(config: PretrainConfig, num_classes: int = 0) -> MaskedAutoencoderViT:
    """Build the model of a run, on the device of the context; it has no classes."""
    return build_mae(**given(config.model, "tokenizer"))


def trial_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of images, uint8 [B, C, H, W], with noise and ids that are made up."""
    inner: MaskedAutoencoderViT = getattr(model, "module", model)
    noise = torch.rand(len(images), inner.num_patches, device=images.device)
    ids = torch.zeros_like(noise, dtype=torch.int64) if inner.target.needs_tokenizer else None
    return model(images.float(), noise, token_ids=ids)[0]


def prepare(config: PretrainConfig, world: World) -> TrainingSetup:
    """Put together model, data, loss, probes and pictures of a run.

    Raises:
        UserError: shards, weights or settings cannot be used.
    """
    shards, loader = training_data(config, world, Augment.of(config.augment))
    with torch.device("meta"):  # without weights, which `train` makes later
        model = build(config)
    token_ids, bands = tokenizer(config, model, world), Bands.of(config)
    first = FirstBatch.of(config, world, shards.classes)

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        image = batch["image"]
        noise = model.noise(config.seed, batch["epoch"], batch["sample"])
        inputs = bands.normalize(image)
        loss, _, mask = engine(inputs, noise, token_ids=token_ids and token_ids(image))
        first.draw(step, micro, inputs, batch["label"], mask, model.grid)
        return loss

    return TrainingSetup(
        "pretrain",
        model,
        shards,
        loader,
        loss_of,
        trial_loss,
        weights=initial_weights(config, model),
        validation=probe(config, world),
        pictures=reconstructions(config, shards) if model.target.is_image else None,
    )


def probe(config: PretrainConfig, world: World) -> Validation | None:
    """Make the validation that probes the encoder every `train.probe_every` steps.

    A probe classifies each image of data.val by its nearest neighbours there. With
    `train.probe_linear` it also fits a linear classifier to the features. No random number of the
    run is used for it, so that training goes on as it would have without.

    Returns:
        The validation; None: `train.probe_every` is null.

    Raises:
        UserError: data.val is not given, is no shard folder, or has no classes.
    """
    if config.train.probe_every is None:
        return None
    if config.data.val is None:
        raise UserError("train.probe_every needs data.val: labelled shards, whose images it probes")
    shards = open_shards(config.data.val, config.data.cache_dir)
    classes, labels = classes_of(shards), torch.tensor(shards.index["label"].astype("int64"))
    loader = eval_loader(config, world, shards)

    def scores(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        # The compiled blocks are for training: they would be compiled again for images without a
        # mask.
        eager = torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
        try:
            with eager:
                bank = features_of(
                    lambda images: engine.module(images, pool=config.train.probe_pool),
                    loader,
                    world.device,
                    doing=watchdog.doing,
                    what="probing",
                    stop=stop,
                )
        except Stopped:
            return None
        found = knn_scores(bank, labels, None, labels, len(classes))
        if config.train.probe_linear:
            found |= linear_scores(bank, labels, len(classes))
        return found

    return Validation(None, scores, None, every_steps=config.train.probe_every)


def tokenizer(
    config: PretrainConfig, model: MaskedAutoencoderViT, world: World
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Load the tokenizer, which gives the target tokens its ids (paper Table 1d).

    Returns:
        A function from images to the ids of their patches; None: the target needs no tokenizer.

    Raises:
        UserError: the file is missing or does not fit, or the target needs none.
    """
    section = config.model
    if model.target.needs_tokenizer != (section.tokenizer is not None):
        raise UserError(
            f"model.target {section.target} with model.tokenizer {section.tokenizer}: the target "
            "tokens, and no other, needs the file of a tokenizer"
        )
    if section.tokenizer is None:
        return None
    if not isinstance(section.img_size, int) or section.in_chans != 3:
        raise UserError("model.target tokens: a tokenizer takes square images of three bands")
    sizes = (section.img_size, model.num_patches, section.vocabulary_size)
    return Tokenizer(section.tokenizer, *sizes).to(world.device)


def first_patches(config: PretrainConfig, patch_size: int, images: int) -> Iterator[torch.Tensor]:
    """Yield the patches of the first images of the run, float32 [n, p*p*C] for each micro-batch.

    They follow from the config alone.

    Args:
        config: config of the run.
        patch_size: p, in pixels.
        images: smallest number of images to yield.
    """
    bands, (_, loader) = (
        Bands.of(config),
        training_data(config, World(), Augment.of(config.augment)),
    )
    with closing(loader):
        for batch in islice(loader.batches(0), -(-images // config.train.micro_batch_size)):
            yield patchify(bands.normalize(batch["image"]), patch_size).flatten(0, 1)


def initial_weights(
    config: PretrainConfig, model: MaskedAutoencoderViT
) -> Callable[[], dict[str, torch.Tensor]] | None:
    """Return a function that reads or computes the tensors that do not start at random values.

    They are the weights to start from, and values that the target computes from the first images.
    None: all tensors start at random values.
    """
    spec, images = config.weights, model.target.fitted_on
    if spec is None and not images:
        return None

    def read() -> dict[str, torch.Tensor]:
        weights = {}
        if spec is not None:
            state = read_any(spec, model)
            warn_of_other_bands(spec, state, Bands.of(config))
            weights = fit_to_mae(state, model, grid=grid_of(spec, state))
            log.info("from %s: %s", spec, fitted(state, weights, model))
        if weights and "decoder_pred.weight" not in weights:
            log.warning("%s has no decoder: training starts with a new one", spec)
        if images:
            # Rank 0 computes these values when a run starts; later they come from checkpoints.
            kept = model.target.fit(first_patches(config, model.patch_size, images))
            weights |= {f"{config.model.target}.{key}": value for key, value in kept.items()}
        return weights

    return read
