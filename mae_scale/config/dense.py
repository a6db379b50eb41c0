"""The parts of a config that detection and segmentation share.

A key that a subclass declares again with another default keeps the text of the first declaration.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import EncoderConfig, RunConfig, TrainConfig
from mae_scale.config.value_types import (
    AtLeast0,
    Changeable,
    From0,
    From1,
    Several,
    Share,
    ShareAbove0,
    ShareBelow1,
    Text,
)

ParameterKind = Literal[
    "weight", "bias", "scale", "layer_norm", "channel_norm", "position", "class_token", "relative"
]
Curve = Literal["cosine", "linear", "steps"]


class DenseModelConfig(EncoderConfig):
    """The encoder of a masked autoencoder, whose features are taken after several blocks."""

    drop_path: ShareBelow1 = 0.1
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""


class DenseTrainConfig(TrainConfig):
    """Length, batch, precision, memory, validation."""

    epochs: From1 = 100
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision in which layers compute; weights, boxes and losses are always fp32. auto: bf16 on
    GPUs, fp32 on CPUs."""
    validate_epochs: Changeable[From1] = 5
    """Epochs between two validations on data.val; the last epoch has one, too."""


class DenseOptimConfig(FinetuneOptimConfig):
    """AdamW and a learning-rate curve over the whole run, with a warm-up counted in steps."""

    base_lr: AtLeast0 = 4e-4
    min_lr: AtLeast0 = 0.0
    """Learning rate at the end of the schedules cosine and linear."""
    schedule: Curve = "steps"
    """Curve of the learning rate after the warm-up: cosine is half a cosine, linear is a line,
    steps divides the rate by 10 at each of drops."""
    drops: Several[ShareAbove0] = (163_889 / 184_375, 177_546 / 184_375)
    """Shares of the run's steps after which the schedule steps divides the learning rate by 10."""
    warmup_epochs: AtLeast0 = 0
    """Epochs of linear warm-up; they count only if warmup_steps is null."""
    warmup_steps: From0 | None = 250
    """Optimiser steps of linear warm-up; null: the steps of warmup_epochs."""
    warmup_factor: Share = 1e-3
    """Factor by which the learning rate is multiplied at the first step of the warm-up."""
    weight_decay: AtLeast0 = 0.1
    """Decoupled weight decay of all parameters, except the kinds in no_decay."""
    no_decay: Several[ParameterKind] = ("layer_norm", "position")
    """Kinds of parameters without weight decay: layer_norm (of tokens), channel_norm (of maps),
    position (absolute), relative (positions), bias, scale (of residual branches), class_token."""

    @property
    def warmup(self) -> str:
        """Length of the warm-up in words."""
        in_steps = self.warmup_steps is not None
        return f"{self.warmup_steps} steps of warm-up" if in_steps else super().warmup

    @property
    def kinds_without_decay(self) -> tuple[str, ...]:
        """Kinds of parameters that are not decayed."""
        return self.no_decay

    @property
    def curve(self) -> str | None:
        """Name of the curve over the whole run (`schedule.curve_rate`)."""
        return self.schedule


class DenseConfig(RunConfig):
    """The keys that detection and segmentation share and that stand in no section."""

    # With bf16 weights boxes would be off by up to 4 pixels, and the running statistics of batch
    # norm would not change: their updates are too small for bf16.
    fp32_weights: ClassVar[bool] = True

    weights: Text | None = None
    """Weights to start from: a run folder of pretrain, of finetune or of the same task, a step
    folder in one, a .pth of the authors, a .safetensors, or a folder of timm or Hugging Face; null:
    from scratch."""
    optim: DenseOptimConfig = Field(default_factory=DenseOptimConfig)
    new_head: bool = False
    """Whether to take only the encoder from weights, even if they belong to a run of this task."""
