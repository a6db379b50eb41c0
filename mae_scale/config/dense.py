"""Config sections of detection, and what segmentation shares with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.numbers import Above0, AtLeast0, From0, From1, Share, ShareAbove0, ShareBelow1
from mae_scale.config.sections import EncoderConfig, RunConfig, TrainConfig, changeable

ParameterKind = Literal[
    "weight", "bias", "scale", "layer_norm", "channel_norm", "position", "class_token", "relative"
]


@dataclass
class DenseOptimConfig(FinetuneOptimConfig):
    """AdamW and a learning-rate curve over the whole run, with a warm-up counted in steps."""

    base_lr: AtLeast0 = 4e-4
    """Learning rate for 256 images; the peak is base_lr x global_batch_size / 256."""
    min_lr: AtLeast0 = 0.0
    """Learning rate at the end of the schedules cosine and linear."""
    schedule: Literal["cosine", "linear", "steps"] = "steps"
    """What follows the warm-up: half a cosine, a line, or a tenth from each of drops on."""
    drops: tuple[ShareAbove0, ...] = (163_889 / 184_375, 177_546 / 184_375)
    """Shares of the run from which on the schedule steps divides the learning rate by 10."""
    warmup_epochs: AtLeast0 = 0
    """Epochs of linear warm-up, where warmup_steps is null."""
    warmup_steps: From0 | None = 250
    """Optimiser steps of linear warm-up; null: as many as warmup_epochs has."""
    warmup_factor: Share = 1e-3
    """Factor of the learning rate at the first step."""
    weight_decay: AtLeast0 = 0.1
    """Decoupled weight decay of all parameters but those of the kinds in no_decay."""
    no_decay: tuple[ParameterKind, ...] = ("layer_norm", "position")
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
        """The curve over the whole run."""
        return self.schedule


# detect


@dataclass
class DetectorConfig(EncoderConfig):
    """Mask R-CNN on the encoder of a masked autoencoder (paper Table 4)."""

    img_size: From1 = 1024
    """Side of the square input image, in pixels; a multiple of twice the patch size."""
    patch_size: From1 | None = None
    """Side of a patch, a power of 2; null: 16. Weights with another patch size are resampled."""
    drop_path: ShareBelow1 = 0.1
    """Rate of stochastic depth in the last block; it rises linearly from 0 in the first one."""
    pyramid: Literal["fpn", "simple"] = "simple"
    """fpn: an FPN on the features of four depths (Li et al. 2021); simple: all maps from the last
    features (ViTDet)."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm in box and mask head: batch over all processes (Li et al. 2021), or layer (ViTDet)."""
    relative: Literal["none", "shared", "table", "decomposed"] = "decomposed"
    """Relative positions: none; shared: one table for all windowed and one for all global blocks
    (Li et al. 2021); table: one in each block; decomposed: a row and a column term (ViTDet)."""
    positions: Literal["fixed", "trained"] = "trained"
    """Absolute positions: fixed sines and cosines (Li et al. 2021), or trained (ViTDet)."""
    pos_grid: From1 | None = None
    """Patches along a side for which trained positions are stored, to be resized in each forward
    pass: 14 in ViTDet; null: those of the image."""
    window: From0 = 14
    """Patches along a side of an attention window; 0: all blocks are global."""
    global_blocks: list[From0] | None = None
    """Numbers, from 0, of the blocks with global attention; null: the last of each quarter."""
    channels: From1 = 256
    """Channels of the pyramid and of the convolutions in the heads."""
    hidden: From1 = 1024
    """Units of the linear layer in the box head."""
    rois: From1 = 512
    """Proposals of an image on which the heads are trained."""
    proposals: From1 = 1000
    """Proposals that the first stage leaves of an image."""
    detections: From1 = 100
    """Detections that are left of an image at the end."""


@dataclass
class DetectAugmentConfig:
    """Large-scale jitter: scale, crop, flip."""

    recipe: Literal["vitdet", "li2021"] = "vitdet"
    """vitdet: flip first, pad with the mean colour; li2021: flip last, pad with grey."""
    scale: tuple[Above0, Above0] = (0.1, 2.0)
    """Smallest and largest size of the whole image, over that of the crop."""


@dataclass
class DetectTrainConfig(TrainConfig):
    """Length, batch, precision, memory."""

    epochs: From1 = 100
    """Epochs of the whole schedule, over the images that have an object."""
    global_batch_size: From1 = 64
    """Images per optimiser step, over all ranks and accumulated micro-batches."""
    micro_batch_size: From1 = changeable(1)
    """Images per rank and forward pass; accumulation steps follow from the global batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision in which layers compute; weights, boxes and losses are fp32. auto: bf16 on GPUs,
    fp32 on CPUs."""
    validate_epochs: From1 = changeable(5)
    """Epochs between two validations on data.val; the last epoch has one, too."""


@dataclass
class DetectConfig(RunConfig):
    """Object detection and instance segmentation on COCO (paper Table 4)."""

    fp32_weights: ClassVar[bool] = True  # bf16 moves a box by 4 pixels

    task: Literal["detect"] = "detect"
    weights: str | None = None
    """What to start from: a run folder of pretrain, finetune or detect or a step folder in it, a
    .pth of the authors, a .safetensors, or a folder of timm or Hugging Face; null: from scratch."""
    model: DetectorConfig = field(default_factory=DetectorConfig)
    augment: DetectAugmentConfig = field(default_factory=DetectAugmentConfig)
    train: DetectTrainConfig = field(default_factory=DetectTrainConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)
    new_head: bool = False
    """Whether to take the encoder only, even if the weights are of a detector."""
