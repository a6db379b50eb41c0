"""Config sections of segmentation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mae_scale.config.dense import (
    Curve,
    DenseConfig,
    DenseModelConfig,
    DenseOptimConfig,
    DenseTrainConfig,
    ParameterKind,
)
from mae_scale.config.keys import Section
from mae_scale.config.value_types import (
    Above0,
    AtLeast0,
    Changeable,
    From0,
    From1,
    Pair,
    Several,
    Share,
    ShareAbove0,
    ShareBelow1,
)


class SegmenterConfig(DenseModelConfig):
    """UperNet on the encoder of a masked autoencoder (paper Table 5)."""

    img_size: From1 = 512
    """Side of the square crop in training and of the windows in validation, in pixels."""
    layer_scale: Above0 | None = 1.0
    """Initial value of the trained factors of the residual branches; null: no factors."""
    relative: Literal["none", "table"] = "table"
    """Relative positions: none, or a table in each block, as in BEiT."""
    out_blocks: list[From0] | None = None
    """Numbers, from 0, of the four blocks whose features the head gets; null: 3, 5, 7, 11 of 12
    blocks, and 7, 11, 15, 23 of 24."""
    channels: From1 | None = None
    """Channels of the head; null: the encoder's width."""
    auxiliary_channels: From1 = 256
    """Channels of the auxiliary head."""
    dropout: ShareBelow1 = 0.1
    """Share of the channels that training sets to zero in front of both classifiers."""


class SegmentAugmentConfig(Section):
    """Scale, crop, flip, colours."""

    scale: Pair[Above0] = (0.5, 2.0)
    """Smallest and largest factor by which the image is resized; at factor 1 the short side is
    img_size, or the long side is four times that where it would be longer."""
    most_of_one: ShareAbove0 = 0.75
    """Largest share of the labelled pixels of a crop that one class may have; a crop beyond it is
    drawn again."""
    colors: bool = True
    """Whether brightness, contrast, saturation and hue change."""


class SegmentTrainConfig(DenseTrainConfig):
    """Length, batch, precision, memory, validation."""

    epochs: From1 = 127
    global_batch_size: From1 = 16
    micro_batch_size: Changeable[From1] = 2
    """Images per rank and forward pass; batch norm sees those of all ranks together."""
    validate_epochs: Changeable[From1] = 10
    validate_stride: Changeable[From1 | None] = None
    """Pixels from one window of validation to the next; null: two thirds of img_size."""


class SegmentOptimConfig(DenseOptimConfig):
    """AdamW, a linear learning rate with a warm-up in steps, layer-wise decay."""

    base_lr: AtLeast0 = 1.6e-3
    schedule: Curve = "linear"
    warmup_steps: From0 | None = 1500
    warmup_factor: Share = 1e-6
    weight_decay: AtLeast0 = 0.05
    no_decay: Several[ParameterKind] = ("bias", "layer_norm", "channel_norm", "scale")
    layer_decay: ShareAbove0 = 0.65


class SegmentConfig(DenseConfig):
    """Semantic segmentation, for example of ADE20K (paper Table 5)."""

    has_batch_statistics: ClassVar[bool] = True

    task: Literal["segment"] = "segment"
    model: SegmenterConfig = Field(default_factory=SegmenterConfig)
    augment: SegmentAugmentConfig = Field(default_factory=SegmentAugmentConfig)
    train: SegmentTrainConfig = Field(default_factory=SegmentTrainConfig)
    optim: SegmentOptimConfig = Field(default_factory=SegmentOptimConfig)
