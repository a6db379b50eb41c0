"""Config sections of segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mae_scale.config.dense import DenseOptimConfig, ParameterKind
from mae_scale.config.numbers import (
    Above0,
    AtLeast0,
    From0,
    From1,
    Share,
    ShareAbove0,
    ShareBelow1,
)
from mae_scale.config.sections import EncoderConfig, RunConfig, TrainConfig, changeable


@dataclass
class SegmenterConfig(EncoderConfig):
    """UperNet on the encoder of a masked autoencoder (paper Table 5)."""

    img_size: From1 = 512
    """Side of the square crop, and of the windows of validation, in pixels."""
    drop_path: ShareBelow1 = 0.1
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""
    layer_scale: Above0 | None = 1.0
    """Initial factors of the residual branches, which are trained; null: no factors."""
    relative: Literal["none", "table"] = "table"
    """Relative positions: none, or a table in each block, as in BEiT."""
    out_blocks: list[From0] | None = None
    """Numbers, from 0, of the four blocks whose features are taken; null: 3, 5, 7, 11 of 12 and
    7, 11, 15, 23 of 24."""
    channels: From1 | None = None
    """Channels of the head; null: the encoder's width."""
    auxiliary_channels: From1 = 256
    """Channels of the auxiliary head."""
    dropout: ShareBelow1 = 0.1
    """Share of the channels that is zeroed in training in front of both classifiers."""


@dataclass
class SegmentAugmentConfig:
    """Scale, crop, flip, colours."""

    scale: tuple[Above0, Above0] = (0.5, 2.0)
    """Smallest and largest factor of the size, at which the short side is img_size or the long
    side four times that."""
    most_of_one: ShareAbove0 = 0.75
    """Share of the labelled pixels that one class of a crop may have before it is drawn again."""
    colors: bool = True
    """Whether brightness, contrast, saturation and hue change."""


@dataclass
class SegmentTrainConfig(TrainConfig):
    """Length, batch, precision, memory, validation."""

    epochs: From1 = 127
    """Epochs of the whole schedule; the learning rate follows it."""
    global_batch_size: From1 = 16
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: From1 = changeable(2)
    """Images per rank and forward pass; batch norm sees those of all ranks together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision in which layers compute; weights and losses are fp32. auto: bf16 on GPUs, fp32 on
    CPUs."""
    validate_epochs: From1 = changeable(10)
    """Epochs between two validations on data.val; the last epoch has one, too."""
    validate_stride: From1 | None = changeable(None)
    """Pixels from one window of validation to the next; null: two thirds of img_size."""


@dataclass
class SegmentOptimConfig(DenseOptimConfig):
    """AdamW, a linear learning rate with a warm-up in steps, layer-wise decay."""

    base_lr: AtLeast0 = 1.6e-3
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    schedule: Literal["cosine", "linear", "steps"] = "linear"
    """What follows the warm-up: half a cosine, a line, or a tenth from each of drops on."""
    warmup_steps: From0 | None = 1500
    """Optimiser steps of linear warm-up; null: as many as warmup_epochs has."""
    warmup_factor: Share = 1e-6
    """Factor of the learning rate at the first step."""
    weight_decay: AtLeast0 = 0.05
    """Decoupled weight decay of all parameters but those of the kinds in no_decay."""
    no_decay: tuple[ParameterKind, ...] = ("bias", "layer_norm", "channel_norm", "scale")
    """Kinds of parameters without weight decay: layer_norm (of tokens), channel_norm (of maps),
    position (absolute), relative (positions), bias, scale (of residual branches), class_token."""
    layer_decay: ShareAbove0 = 0.65
    """Factor of the learning rate from each layer to the one before it; 1: the same for all."""


@dataclass
class SegmentConfig(RunConfig):
    """Semantic segmentation, as of ADE20K (paper Table 5)."""

    fp32_weights: ClassVar[bool] = True  # statistics of batch norm among them
    has_batch_statistics: ClassVar[bool] = True

    task: Literal["segment"] = "segment"
    weights: str | None = None
    """What to start from: a run folder of pretrain, finetune or segment or a step folder in it, a
    .pth of the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    train: SegmentTrainConfig = field(default_factory=SegmentTrainConfig)
    optim: SegmentOptimConfig = field(default_factory=SegmentOptimConfig)
    new_head: bool = False
    """Whether to take the encoder only, even if the weights are of a segmenter."""
