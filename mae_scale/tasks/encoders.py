"""Encoders that describe images by features, read from a run or from foreign weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mae_scale.config.sizes import ImageSize, plain_size
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.errors import UserError
from mae_scale.launch.distributed import on_rank0
from mae_scale.models import MaskedAutoencoderViT, build_classifier, build_mae
from mae_scale.models.classifier import Classifier
from mae_scale.models.description import Description, describe
from mae_scale.models.encoder import Encoder, Pool
from mae_scale.models.weights import fit_to_classifier, fit_to_mae, read_weights
from mae_scale.tasks.trained import (
    TrainedRun,
    bands_of,
    best_checkpoint,
    grid_in,
    grid_of,
    is_ours,
)


@dataclass
class Describer:
    """An encoder, and the way in which it reads and describes images."""

    model: Encoder
    """The encoder, in evaluation mode."""
    pool: Pool
    """Features that describe an image: the class token's ("token"), or the patches' mean."""
    crop_ratio: float | None
    """Share of the short side that the centre crop covers; None: the usual one for the size."""
    source: str
    """Path of the weights and, for a run, the step folder; for messages."""
    max_pixels: int = MAX_PIXELS
    """Most pixels that an image may have, as the run says."""
    bands: Bands = RGB
    """Bands of the images, and how they are normalised."""

    @property
    def features(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Function from normalised images, float [b, C, H, W], to their features, [b, D]."""
        if isinstance(self.model, MaskedAutoencoderViT):
            return lambda images: self.model(images, pool=self.pool)
        assert isinstance(self.model, Classifier)
        return self.model.features


def read_describer(
    weights: str | Path,
    *,
    pool: Pool | None = None,
    name: str | None = None,
    img_size: ImageSize | None = None,
    ema: bool = False,
) -> Describer:
    """Read an encoder, in fp32 on the CPU; all ranks call.

    Args:
        weights: run folder of pretrain, finetune or linprobe, a step folder in one, or foreign
            weights.
        pool: features that describe an image; None: the class token of a masked autoencoder, and
            for a classifier the features that its head gets.
        name: architecture of foreign weights; None: the one that they name.
        img_size: side, or height and width, of the images in pixels; None: that of the weights.
        ema: whether to take the moving average of the weights.

    Raises:
        UserError: there are no such weights, or they do not fit the other arguments.
    """
    crop_ratio, max_pixels = None, MAX_PIXELS
    if is_ours(weights):
        trained = TrainedRun.read(on_rank0(lambda: best_checkpoint(weights)))
        model: nn.Module = trained.model(img_size)
        if not isinstance(model, MaskedAutoencoderViT | Classifier):
            raise UserError(
                f"{trained.run_dir} is a run of {trained.task.name}; expected one of pretrain, "
                "finetune or linprobe"
            )
        state, source = trained.weights(ema), f"{weights}, {trained.folder.name}"
        grid, max_pixels = grid_of(trained.folder, state), trained.config.data.max_pixels
        bands, own_size = Bands.of(trained.config), plain_size(trained.config.model.img_size)
        if img_size is None or plain_size(img_size) == own_size:
            crop_ratio = getattr(trained.config.model, "crop_ratio", None)
    else:
        if ema:
            raise UserError(f"--ema: {weights} is no run folder, which a moving average is in")
        state, source = read_weights(weights), str(weights)
        described = describe(weights)
        name = name or described.name
        if name is None:
            raise UserError(f"{weights} is no run folder and does not say what it is: --model NAME")
        sizes = described.sizes_for(state)
        bands, grid = bands_of(weights, described, sizes), grid_in(sizes)
        model = _foreign(state, name, img_size, described)
        if img_size is None or plain_size(img_size) == sizes.get("img_size"):
            crop_ratio = described.crop_ratio
    if isinstance(model, MaskedAutoencoderViT):
        found = fit_to_mae(state, model, grid=grid)
        pool = pool or "token"
    else:
        assert isinstance(model, Classifier)
        found = fit_to_classifier(state, model, grid=grid)
        if pool not in (None, model.pool):
            raise UserError(
                f"--pool {pool}: {weights} has a head that classifies the {model.pool} of its "
                f"features; leave it out, or take --pool {model.pool}"
            )
        pool = model.pool
    # Keys that are missing, such as those of a decoder or a head, play no part in the features.
    model.load_state_dict(found, strict=False)
    return Describer(model.eval(), pool, crop_ratio, source, max_pixels, bands)


def _foreign(
    state: dict[str, torch.Tensor], name: str, img_size: ImageSize | None, described: Description
) -> Encoder:
    sizes = described.sizes_for(state, decoder="decoder_embed.weight" in state)
    if img_size is not None:
        sizes["img_size"] = img_size
    if "fc_norm.weight" in state:
        return build_classifier(name, num_classes=len(state["head.bias"]), pool="mean", **sizes)
    return build_mae(name, **described.switches, **sizes)
