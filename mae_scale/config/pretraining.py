"""The config of pre-training (paper section 3, Table 8)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mae_scale.config.keys import Section
from mae_scale.config.sections import BandedConfig, OptimConfig, RunConfig, TrainConfig
from mae_scale.config.value_types import (
    Between0And1,
    Changeable,
    From1,
    Pair,
    Share,
    ShareAbove0,
    Size,
    Text,
)


class ModelConfig(BandedConfig):
    """The masked autoencoder (paper section 3)."""

    mask_ratio: Between0And1 = 0.75
    """Mask ratio: share of the patches that is removed (paper Figure 5)."""
    mask_sampling: Literal["random", "block", "grid"] = "random"
    """Rule that chooses the removed patches: random, each by itself; block, rectangles as in BEiT;
    grid, all but one of every four (paper Table 1f)."""
    mask_tokens_in_encoder: bool = False
    """Whether the encoder sees mask tokens in the place of removed patches (paper Table 1c)."""
    target: Literal["pixels", "pca", "tokens"] = "pixels"
    """Target that the model predicts for a removed patch (paper Table 1d): its pixels, their
    largest PCA coefficients, or the id that a tokenizer gives to the patch."""
    norm_pix_loss: bool = True
    """Whether the target is each patch's pixels normalised by their own mean and deviation."""
    pca_components: From1 = 96
    """Number of coefficients of the target pca; its components are computed from the first 2048
    images of the run."""
    tokenizer: Text | None = None
    """File of the tokenizer for the target tokens: a TorchScript module (.pt), or a .safetensors
    of DALL-E's dVAE encoder."""
    vocabulary_size: From1 = 8192
    """Number of different ids that the tokenizer gives."""
    fewer_passes: bool = False
    """Whether visible patches are selected before they are projected, which is a quarter of the
    work, and targets are normalised in one pass. Results differ by rounding only."""
    decoder_embed_dim: Size | None = None
    """Width of the decoder, in channels; null takes the architecture's (paper Table 1b)."""
    decoder_depth: Size | None = None
    """Blocks of the decoder; null takes the architecture's (paper Table 1a)."""
    decoder_num_heads: Size | None = None
    """Attention heads of the decoder, which must divide decoder_embed_dim; null: the
    architecture's."""


class PretrainAugmentConfig(Section):
    """Random changes of training images (paper Table 1e); by default a random crop and a flip."""

    crop: Literal["none", "fixed", "random"] = "random"
    """Kind of crop: none is the centre, without a flip; fixed is a square at a random place that
    covers 0.875 of the short side; random is a RandomResizedCrop."""
    crop_scale: Pair[ShareAbove0] = (0.2, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    hflip: bool = True
    """Whether half of the images are mirrored, left to right; with crop none, no image is."""
    color_jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""


class PretrainTrainConfig(TrainConfig):
    """Length, batch, precision, memory, pictures, probes."""

    reconstruct_every: Changeable[From1 | None] = 5000
    """Optimiser steps between two pictures of how the model reconstructs the same eight images,
    taken from data.val if it is given; the last step has a picture, too; null: no pictures."""
    probe_every: Changeable[From1 | None] = None
    """Optimiser steps between two probes; the last step has one, too. A probe classifies each image
    of data.val by its nearest neighbours there, by the encoder's features. null: no probes.
    Training goes on as it would have without."""
    probe_pool: Changeable[Literal["mean", "token"]] = "token"
    """Features that a probe compares: the mean of the patches' features, or the class token's."""
    probe_linear: Changeable[bool] = False
    """Whether a probe also fits a linear classifier to one half of data.val and measures it on the
    other half."""


class PretrainConfig(RunConfig):
    """Pre-training of a masked autoencoder (paper section 3, Table 8)."""

    task: Literal["pretrain"] = "pretrain"
    model: ModelConfig = Field(default_factory=ModelConfig)
    augment: PretrainAugmentConfig = Field(default_factory=PretrainAugmentConfig)
    train: PretrainTrainConfig = Field(default_factory=PretrainTrainConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
