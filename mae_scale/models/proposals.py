"""The two stages of Mask R-CNN as Detectron2 computes them, on torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

Targets = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Conventions:
    """Switches between Detectron2 and torchvision; the defaults are Detectron2's.

    `TORCHVISION` has the other values, so that a test can compare the code with torchvision.
    """

    box_beta: float = 0.0
    """Point at which the smooth L1 loss of boxes turns from a parabola to a line; 0: plain L1."""
    fixed_anchor_count: bool = True
    """Whether the losses of the RPN are divided by the number of anchors that should be drawn from
    each image, even where fewer could be drawn."""
    rounded_anchors: bool = False
    """Whether anchors around the origin are rounded to whole pixels."""
    aligned: bool = True
    """Whether RoIAlign takes the centre of a pixel to be half a pixel from its edge."""
    sampling_ratio: int = 0
    """Number of points along each side of a bin of RoIAlign; 0: as many as the bin has pixels."""
    aligned_masks: bool = True
    """Whether the targets of masks are aligned like `aligned`; they are then exactly 0 or 1."""


DETECTRON2 = Conventions()
TORCHVISION = Conventions(1 / 9, False, True, False, 2, False)


class Anchors(AnchorGenerator):
    """torchvision's anchors in fp32 whatever the dtype of the features, rounded only on request."""

    def __init__(self, sizes: Sequence[int], rounded: bool) -> None:
        self._rounded = rounded
        super().__init__(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Make boxes around the origin, float32 [N, 4]."""
        ratio = torch.tensor(aspect_ratios, device="cpu").sqrt()[:, None]
        scale = torch.tensor(scales, dtype=torch.float32, device="cpu")[None]
        w, h = (scale / ratio).flatten(), (scale * ratio).flatten()
        boxes = torch.stack([-w, -h, w, h], dim=1) / 2
        return boxes.round() if self._rounded else boxes

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the anchors, keep their dtype: in bf16 coordinates near 1000 are 4 pixels apart."""
        super().set_cell_anchors(torch.float32, device)


class Fp32RPNHead(RPNHead):
    """torchvision's head with outputs in fp32, so that boxes are computed in fp32."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Compute objectness [B, A, H, W] and offsets [B, 4 A, H, W] of each map [B, C, H, W]."""
        logits, offsets = super().forward(x)
        return [y.float() for y in logits], [y.float() for y in offsets]


class ProposalNetwork(RegionProposalNetwork):
    """The RPN, with the losses of Detectron2.

    Args:
        channels: number of channels of the maps.
        sizes: size of the anchors at each level, in pixels.
        samples: number of anchors of each image in the losses, at most half of them positive.
        kept: number of proposals kept after NMS.
        conventions: choices between Detectron2's and torchvision's way of computing.
        convs: number of convolutions of the head.
    """

    def __init__(
        self,
        channels: int,
        sizes: Sequence[int],
        samples: int = 256,
        kept: int = 1000,
        conventions: Conventions = DETECTRON2,
        convs: int = 2,
    ) -> None:
        anchors = Anchors(sizes, conventions.rounded_anchors)
        head = Fp32RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=convs)
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * kept, "testing": kept},
            post_nms_top_n={"training": kept, "testing": kept},
            nms_thresh=0.7,
        )
        self._samples, self._conventions = samples, conventions

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the losses of objectness and of boxes, float32 scalars."""
        positive, negative = (torch.cat(part) > 0 for part in self.fg_bg_sampler(labels))
        drawn = positive | negative
        beta, fixed = self._conventions.box_beta, self._conventions.fixed_anchor_count
        count = self._samples * len(labels) if fixed else int(drawn.sum())
        box_loss = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=beta,
            reduction="sum",
        )
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[drawn], torch.cat(labels)[drawn], reduction="sum"
        )
        return objectness_loss / count, box_loss / count


class RoIPool(nn.Module):
    """RoIAlign from the pyramid level that fits a box; torchvision's own pooling is not aligned.

    Args:
        size: number of rows, and of columns, of the result.
        strides: stride of each level, in pixels; powers of 2.
        conventions: choices between Detectron2's and torchvision's way of computing.
    """

    def __init__(self, size: int, strides: Sequence[int], conventions: Conventions) -> None:
        super().__init__()
        self._size, self._strides, self._conventions = size, tuple(strides), conventions
        self._level_of = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(self, maps: Sequence[torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Pool the features of boxes.

        Args:
            maps: [B, C, H, W] for each level; further maps are not used.
            boxes: float32 [N, 4] for each image, in pixels of the image.

        Returns:
            [sum of N, C, size, size], image after image.
        """
        numbers = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([numbers, torch.cat(boxes)], dim=1)
        levels = self._level_of(boxes)
        shape = (len(rois), maps[0].shape[1], self._size, self._size)
        result = maps[0].new_zeros(shape)
        for level, (features, stride) in enumerate(zip(maps, self._strides, strict=False)):
            here = torch.where(levels == level)[0]
            pooled = roi_align(
                features,
                rois[here],
                (self._size, self._size),
                1 / stride,
                self._conventions.sampling_ratio,
                self._conventions.aligned,
            )
            result = result.index_put((here,), pooled.to(result.dtype))
        return result


class InstanceHeads(RoIHeads):
    """The heads for classes, boxes and masks of proposals, with the losses of Detectron2.

    The arguments are those of torchvision's `RoIHeads`, and `conventions` as for `RoIPool`.
    """

    def __init__(self, *args: Any, conventions: Conventions = DETECTRON2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._conventions = conventions

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if module is self.box_predictor.cls_score:
                nn.init.normal_(module.weight, std=0.01)
            elif module in (self.box_predictor.bbox_pred, self.mask_predictor.mask_fcn_logits):
                nn.init.normal_(module.weight, std=0.001)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Return losses in training, and detections otherwise; each process calls every module.

        Args:
            features: maps of the pyramid, [B, C, H, W] each.
            proposals: float32 [N, 4] for each image, in pixels.
            image_shapes: height and width of each image without its padding.
            targets: a dict for each image, in training: "boxes" float32 [N, 4], "labels" int64 [N]
                from 1, "masks" bool [N, H, W].

        Returns:
            detections: a dict for each image: "boxes", "labels" from 1, "scores", "masks"
                [N, 1, M, M].
            losses: a dict: "loss_classifier", "loss_box_reg", "loss_mask".
        """
        if self.training:
            proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = (y.float() for y in self.box_predictor(box_features))
        if not self.training:
            return self._detections(features, logits, deltas, proposals, image_shapes), {}
        assert targets is not None
        positive = [torch.where(label > 0)[0] for label in labels]
        boxes = [p[i] for p, i in zip(proposals, positive, strict=True)]
        mask_logits = self._mask_logits(features, boxes)
        truth = [
            self._mask_targets(t["masks"], b, m[i], mask_logits.shape[-1])
            for t, b, m, i in zip(targets, boxes, matched, positive, strict=True)
        ]
        of_positive = torch.cat([label[i] for label, i in zip(labels, positive, strict=True)])
        loss_classifier, loss_box_reg = self._box_losses(
            logits, deltas, torch.cat(labels), torch.cat(offsets)
        )
        return [], {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box_reg,
            "loss_mask": mask_loss(mask_logits, of_positive, torch.cat(truth)),
        }

    def _box_losses(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positive = torch.where(labels > 0)[0]
        found = deltas.reshape(len(labels), -1, 4)[positive, labels[positive]]
        loss = F.smooth_l1_loss(
            found, targets[positive], beta=self._conventions.box_beta, reduction="sum"
        )
        return F.cross_entropy(logits, labels), loss / max(1, len(labels))

    def _mask_logits(
        self, features: Sequence[torch.Tensor], boxes: list[torch.Tensor]
    ) -> torch.Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()

    def _mask_targets(
        self, masks: torch.Tensor, boxes: torch.Tensor, matched: torch.Tensor, size: int
    ) -> torch.Tensor:
        """Cut out the mask of each box's object: float32 [N, size, size]."""
        rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
        aligned = self._conventions.aligned_masks
        # Here torchvision, like Detectron2, takes as many points in a bin as the bin has pixels.
        found = roi_align(masks[:, None].float(), rois, (size, size), 1.0, -1, aligned)[:, 0]
        return (found >= 0.5).float() if aligned else found

    def _detections(
        self,
        features: Sequence[torch.Tensor],
        logits: torch.Tensor,
        deltas: torch.Tensor,
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        logits = self._mask_logits(features, boxes)
        place = torch.arange(len(logits), device=logits.device)
        masks = logits[place, torch.cat(labels)].sigmoid().unsqueeze(1)
        each = zip(boxes, scores, labels, masks.split([len(b) for b in boxes]), strict=True)
        return [dict(zip(("boxes", "scores", "labels", "masks"), one, strict=True)) for one in each]


def mask_loss(logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Average the binary cross-entropy of the true classes' masks; 0 where there are no boxes.

    Args:
        logits: float32 [N, classes, M, M].
        labels: int64 [N], the true class of each box.
        truth: float32 [N, M, M], 0 or 1.
    """
    if not len(labels):
        return logits.sum() * 0
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, truth)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Turn masks of boxes into masks of an image, sampled at the centres of its pixels.

    Args:
        masks: probabilities, float32 [N, M, M] or [N, 1, M, M].
        boxes: float32 [N, 4] in pixels of that image, not rounded.
        size: height and width.

    Returns:
        bool [N, height, width], true where the probability is at least 1/2.
    """
    result = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        x0, y0, x1, y1 = box.tolist()
        # A mask fades outside of its box: only pixels whose centres lie within can reach 1/2.
        left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
        right, bottom = min(size[1], math.ceil(x1)), min(size[0], math.ceil(y1))
        if right <= left or bottom <= top or x1 <= x0 or y1 <= y0:
            continue
        x = (torch.arange(left, right, device=box.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom, device=box.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        found = F.grid_sample(mask.reshape(1, 1, *mask.shape[-2:]), grid, align_corners=False)
        result[i, top:bottom, left:right] = found[0, 0] >= 0.5
    return result
