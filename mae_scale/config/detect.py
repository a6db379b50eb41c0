"""Config sections of detection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mae_scale.config.dense import DenseConfig, DenseModelConfig, DenseTrainConfig
from mae_scale.config.keys import Section
from mae_scale.config.value_types import Above0, Changeable, From0, From1, Pair


class DetectorConfig(DenseModelConfig):
    """Mask R-CNN on the encoder of a masked autoencoder (paper Table 4)."""

    img_size: From1 = 1024
    """Side of the square input image, in pixels; a multiple of twice the patch size."""
    patch_size: From1 | None = None
    """Side of a patch, a power of 2; null: 16. Weights with another patch size are resampled."""
    pyramid: Literal["fpn", "simple"] = "simple"
    """Kind of feature pyramid: fpn is an FPN on the features of four depths (Li et al. 2021);
    simple makes all maps from the last features (ViTDet)."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm in the box head and the mask head: batch is batch norm over all processes (Li et al.
    2021); layer is layer norm (ViTDet)."""
    relative: Literal["none", "shared", "table", "decomposed"] = "decomposed"
    """Relative positions: none; shared, one table for all windowed blocks and one for all global
    blocks (Li et al. 2021); table, one in each block; decomposed, a row term and a column term in
    each block (ViTDet)."""
    positions: Literal["fixed", "trained"] = "trained"
    """Absolute positions: fixed sines and cosines (Li et al. 2021), or trained (ViTDet)."""
    pos_grid: From1 | None = None
    """Patches along a side of the stored grid of trained positions, which each forward pass resizes
    to the image: 14 in ViTDet; null: the grid of the image."""
    window: From0 = 14
    """Patches along a side of an attention window; 0: all blocks are global."""
    global_blocks: list[From0] | None = None
    """Numbers, from 0, of the blocks with global attention; null: the last block of each quarter of
    the encoder."""
    channels: From1 = 256
    """Channels of the pyramid and of the convolutions in the heads."""
    hidden: From1 = 1024
    """Units of the linear layer in the box head."""
    rois: From1 = 512
    """Proposals per image on which the heads are trained."""
    proposals: From1 = 1000
    """Largest number of proposals per image that the first stage passes on."""
    detections: From1 = 100
    """Largest number of detections per image."""


class DetectAugmentConfig(Section):
    """Large-scale jitter: scale, crop, flip."""

    recipe: Literal["vitdet", "li2021"] = "vitdet"
    """Order and padding: vitdet flips first and pads with the mean colour; li2021 flips last and
    pads with grey."""
    scale: Pair[Above0] = (0.1, 2.0)
    """Smallest and largest size of the whole image, divided by the size of the crop."""


class DetectTrainConfig(DenseTrainConfig):
    """Length, batch, precision, memory, validation."""

    epochs: From1 = 100
    """Epochs of the whole schedule; an epoch has the images that show an object."""
    global_batch_size: From1 = 64
    micro_batch_size: Changeable[From1] = 1


class DetectConfig(DenseConfig):
    """Object detection and instance segmentation on COCO (paper Table 4)."""

    task: Literal["detect"] = "detect"
    model: DetectorConfig = Field(default_factory=DetectorConfig)
    augment: DetectAugmentConfig = Field(default_factory=DetectAugmentConfig)
    train: DetectTrainConfig = Field(default_factory=DetectTrainConfig)
