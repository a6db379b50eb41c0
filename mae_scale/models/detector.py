"""Mask R-CNN on the plain Vision Transformer of pre-training (paper Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from mae_scale.errors import UserError
from mae_scale.models.dense import DenseEncoder, Positions, Relative
from mae_scale.models.mae import architecture
from mae_scale.models.norms import NORMS
from mae_scale.models.proposals import (
    DETECTRON2,
    Conventions,
    InstanceHeads,
    ProposalNetwork,
    RoIPool,
    Targets,
)
from mae_scale.models.pyramid import FpnPyramid, SimplePyramid

Pyramid = Literal["fpn", "simple"]


def build_detector(name: str, num_classes: int, **overrides: Any) -> Detector:
    """Build the detector on the encoder of one of `mae.MODELS`, with fresh weights.

    Args:
        name: name of the masked autoencoder; its sizes are defaults, but patches have 16 pixels.
        num_classes: number of categories of objects.
        overrides: keyword arguments of `Detector` that replace the model's own.

    Raises:
        UserError: unknown name, or sizes that do not fit each other.
    """
    own = {k: v for k, v in architecture(name).items() if not k.startswith("decoder_")}
    return Detector(num_classes=num_classes, **{**own, "patch_size": 16, **overrides})


class Detector(nn.Module):
    """Encoder, feature pyramid, proposals, and heads for classes, boxes and masks.

    Two published recipes are its two extremes. Li et al. 2021 have an FPN on four depths, batch
    norm, shared tables of relative positions, fixed absolute ones. ViTDet has a simple pyramid on
    the last features, layer norm, decomposed relative positions, trained absolute ones.

    Args:
        num_classes: number of categories of objects.
        img_size, patch_size: sides of the square image and its patches, in pixels.
        embed_dim, depth, num_heads: width, blocks and attention heads of the encoder.
        drop_path: rate of stochastic depth in the last block.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks.
        pyramid: "fpn" takes features after the last block of each quarter, "simple" the last ones.
        norm: norm in box and mask head: "batch" over all processes, or "layer" over channels.
        relative, positions, pos_grid, window: see `DenseEncoder`.
        global_blocks: blocks whose attention is global; None: the last of each quarter.
        channels: channels of the pyramid and of the convolutions in the heads.
        hidden: number of units of the box head's linear layer.
        rois: number of proposals of each image that train the heads.
        proposals: number of proposals kept for each image after the first stage.
        detections: largest number of detections returned for each image.
        conventions: choices between Detectron2's and torchvision's way of computing.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        img_size: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        pyramid: Pyramid = "simple",
        norm: Literal["batch", "layer"] = "layer",
        relative: Relative = "decomposed",
        positions: Positions = "trained",
        pos_grid: int | None = None,
        window: int = 14,
        global_blocks: Sequence[int] | None = None,
        channels: int = 256,
        hidden: int = 1024,
        rois: int = 512,
        proposals: int = 1000,
        detections: int = 100,
        conventions: Conventions = DETECTRON2,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"a detector needs at least 1 category, not {num_classes}")
        if patch_size < 4 or patch_size & (patch_size - 1):
            raise UserError(
                f"patch_size {patch_size} must be a power of 2 of at least 4 pixels: the pyramid "
                "doubles and halves it"
            )
        if img_size % (2 * patch_size):
            raise UserError(
                f"img_size {img_size} must be a multiple of {2 * patch_size}, twice the patch size"
            )
        if pyramid == "fpn" and embed_dim % 32:
            raise UserError(f"pyramid fpn needs an embed_dim that 32 divides, not {embed_dim}")
        self.num_classes = num_classes
        quarters = quarter_ends(depth)
        self.backbone = DenseEncoder(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
            mlp_ratio=mlp_ratio,
            out_blocks=quarters if pyramid == "fpn" else (depth - 1,),
            window=window,
            global_blocks=quarters if global_blocks is None else tuple(global_blocks),
            relative=relative,
            positions=positions,
            pos_grid=pos_grid,
        )
        make_pyramid = FpnPyramid if pyramid == "fpn" else SimplePyramid
        self.pyramid = make_pyramid(embed_dim, channels)
        strides = [patch_size // 4 * 2**i for i in range(5)]
        self.rpn = ProposalNetwork(
            channels, [8 * s for s in strides], kept=proposals, conventions=conventions
        )
        norm_layer, convs = NORMS[norm], [channels] * 4
        self.roi_heads = InstanceHeads(
            box_roi_pool=RoIPool(7, strides[:4], conventions),
            box_head=FastRCNNConvFCHead((channels, 7, 7), convs, [hidden], norm_layer),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=detections,
            mask_roi_pool=RoIPool(14, strides[:4], conventions),
            mask_head=MaskRCNNHeads(channels, convs, 1, norm_layer),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
            conventions=conventions,
        )
        for module in self.modules():
            if module is not self:
                self.initialize_module(module)

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        for part in (self.backbone, self.pyramid, self.rpn, self.roi_heads):
            if any(module is inner for inner in part.modules()):
                part.initialize_module(module)

    def set_activation_checkpointing(
        self, every: Literal["none", "full"] | int, offload: bool = False
    ) -> None:
        """Recompute blocks of the encoder; see `Encoder.set_activation_checkpointing`."""
        self.backbone.set_activation_checkpointing(every, offload)

    def layer_of(self, name: str) -> int:
        """Return the number of a parameter's layer, for layer-wise decay.

        It is 0 for position and patch embedding; k + 1 for block k; depth + 1 for pyramid and
        heads.
        """
        if name.startswith("backbone."):
            return self.backbone.layer_of(name.removeprefix("backbone."))
        return len(self.backbone.blocks) + 1

    def forward(
        self, images: torch.Tensor, sizes: torch.Tensor, targets: Targets | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Return losses in training, and detections otherwise.

        Args:
            images: float32 [B, 3, S, S], normalised, padded at the right and at the bottom.
            sizes: int64 [B, 2], height and width of each image without its padding.
            targets: a dict for each image, in training: "boxes" float32 [N, 4] in pixels, x0, y0,
                x1, y1; "classes" int64 [N] from 0; "masks" bool [N, S, S].

        Returns:
            In training, the five losses by name, float32 scalars. Otherwise a dict for each image,
            sorted by falling score: "boxes" float32 [N, 4] in pixels of the input, "classes" int64
            [N], "scores" float32 [N], "masks" float32 [N, 28, 28], which `paste_masks` puts into
            an image.
        """
        maps = self.pyramid(self.backbone(images))
        shapes = [(int(h), int(w)) for h, w in sizes.tolist()]
        if targets is not None:  # 0 stands for the background
            targets = [{**target, "labels": target["classes"] + 1} for target in targets]
        by_name = {str(i): x for i, x in enumerate(maps)}
        boxes, losses = self.rpn(ImageList(images, shapes), by_name, targets)
        found, more = self.roi_heads(maps, boxes, shapes, targets)
        if self.training:
            return {**losses, **more}
        return [
            {
                "boxes": each["boxes"],
                "classes": each["labels"] - 1,
                "scores": each["scores"],
                "masks": each["masks"].squeeze(1),
            }
            for each in found
        ]


def quarter_ends(depth: int) -> tuple[int, ...]:
    """List the last block of each quarter of the encoder.

    Raises:
        UserError: 4 does not divide the depth.
    """
    if depth % 4:
        raise UserError(f"depth {depth} must be a multiple of 4: features are taken of quarters")
    return tuple(depth // 4 * k - 1 for k in range(1, 5))
