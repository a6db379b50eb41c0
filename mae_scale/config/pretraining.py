"""The config of pre-training (paper section 3, Table 8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mae_scale.config.numbers import Between0And1, From1, Share, ShareAbove0
from mae_scale.config.sections import BandedConfig, OptimConfig, RunConfig, TrainConfig, changeable


@dataclass
class ModelConfig(BandedConfig):
    """The masked autoencoder (paper section 3)."""

    mask_ratio: Between0And1 = 0.75
    """Share of the patches that is removed (paper Figure 5)."""
    mask_sampling: Literal["random", "block", "grid"] = "random"
    """Rule by which they are chosen: each by itself, rectangles as in BEiT, or all but one of every
    four (paper Table 1f)."""
    mask_tokens_in_encoder: bool = False
    """Whether the encoder sees mask tokens in the place of removed patches (paper Table 1c)."""
    target: Literal["pixels", "pca", "tokens"] = "pixels"
    """Target that is predicted of a removed patch (paper Table 1d): its pixels, their largest PCA
    coefficients, or the id that a tokenizer gives to it."""
    norm_pix_loss: bool = True
    """Whether the target is each patch's pixels normalised by their own mean and deviation."""
    pca_components: From1 = 96
    """Coefficients of the target pca; the components are those of the run's first 2048 images."""
    tokenizer: str | None = None
    """File of the tokenizer for the target tokens: a TorchScript module (.pt), or a .safetensors
    of DALL-E's dVAE encoder."""
    vocabulary_size: From1 = 8192
    """Number of different ids that the tokenizer gives."""
    fewer_passes: bool = False
    """Whether the pixels of visible patches are gathered before they are projected, a quarter of
    the work, and targets are normalised in one pass. The numbers are the same but for rounding."""
    decoder_embed_dim: From1 | None = None
    """Width of the decoder, in channels; null takes the architecture's (paper Table 1b)."""
    decoder_depth: From1 | None = None
    """Blocks of the decoder; null takes the architecture's (paper Table 1a)."""
    decoder_num_heads: From1 | None = None
    """Attention heads of the decoder, which must divide decoder_embed_dim; null: the
    architecture's."""


@dataclass
class PretrainAugmentConfig:
    """Random changes of training images (paper Table 1e); by default a random crop and a flip."""

    crop: Literal["none", "fixed", "random"] = "random"
    """none: the centre, without a flip; fixed: a square of fixed size somewhere, covering 0.875 of
    the short side; random: a RandomResizedCrop."""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.2, 1.0)
    """Smallest and largest share of the image's area in a RandomResizedCrop."""
    hflip: bool = True
    """Whether half of the images are mirrored, left to right; under crop none, none are."""
    color_jitter: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation, 0 to 1; 0: none."""


@dataclass
class PretrainTrainConfig(TrainConfig):
    """Length, batch, precision, memory, pictures, probes."""

    reconstruct_every: From1 | None = changeable(5000)
    """Optimiser steps between two pictures of what becomes of the same eight images, those of
    data.val if it is given; the last step has one, too; null: none."""
    probe_every: From1 | None = changeable(None)
    """Optimiser steps between two probes, of which the last step has one, too: each image of
    data.val is classified by its nearest neighbours there, by the encoder's features. null: none.
    Training goes on as it would have without."""
    probe_pool: Literal["mean", "token"] = changeable("token")
    """Features of a probe: the mean of the patches', or the class token's."""
    probe_linear: bool = changeable(False)
    """Whether a probe also fits a linear classifier to one half of data.val for the other half."""


@dataclass
class PretrainConfig(RunConfig):
    """Pre-training of a masked autoencoder (paper section 3, Table 8)."""

    task: Literal["pretrain"] = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: PretrainAugmentConfig = field(default_factory=PretrainAugmentConfig)
    train: PretrainTrainConfig = field(default_factory=PretrainTrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
