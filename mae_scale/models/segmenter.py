"""UperNet on the plain Vision Transformer of pre-training (paper Table 5, Appendix A.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from mae_scale.errors import UserError
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.mae import architecture
from mae_scale.models.norms import NORMS, CountedBatchNorm
from mae_scale.models.pyramid import FourScales

IGNORE = 255  # label of pixels that count for nothing
POOLS = (1, 2, 3, 6)  # numbers of cells along a side of the pooled maps


def build_segmenter(name: str, num_classes: int, **overrides: Any) -> Segmenter:
    """Build the segmenter on the encoder of one of `mae.MODELS`, with fresh weights.

    Args:
        name: name of the masked autoencoder; its sizes are defaults.
        num_classes: number of classes of pixels.
        overrides: keyword arguments of `Segmenter` that replace the model's own.

    Raises:
        UserError: unknown name, or sizes that do not fit each other.
    """
    own = {k: v for k, v in architecture(name).items() if not k.startswith("decoder_")}
    return Segmenter(num_classes=num_classes, **{**own, **overrides})


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Make a convolution without bias, batch norm over all processes, and ReLU."""
    return Conv2dNormActivation(inputs, outputs, kernel, norm_layer=NORMS["batch"])


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path, and all maps joined at the finest one.

    Args:
        width: number of channels of the four maps.
        channels: number of channels of the head.
        num_classes: number of outputs.
        dropout: share of the channels that is zeroed in training before the last layer.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), _conv(width, channels, 1)) for cells in POOLS
        )
        self.pooled = _conv(width + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(_conv(width, channels, 1) for _ in range(3))
        self.outputs = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.joined = _conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Turn maps [B, width, H, W], fine to coarse, into logits [B, classes, H, W]."""
        coarse = maps[-1]
        context = [coarse, *(_resized(pool(coarse), coarse) for pool in self.pools)]
        above = self.pooled(torch.cat(context, dim=1))
        found = [above]
        for lateral, output, x in reversed(
            list(zip(self.laterals, self.outputs, maps, strict=False))
        ):
            x = lateral(x)
            above = x + _resized(above, x)
            found.insert(0, output(above))
        finest = found[0]
        joined = self.joined(torch.cat([finest, *(_resized(x, finest) for x in found[1:])], dim=1))
        return self.classifier(self.dropout(joined))


class AuxiliaryHead(nn.Sequential):
    """A convolution and a classifier on the third map, which only help in training.

    Args:
        width: number of channels of the map.
        channels: number of channels of the convolution.
        num_classes: number of outputs.
        dropout: share of the channels that is zeroed in training before the last layer.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(
            _conv(width, channels, 3), nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)
        )


class Segmenter(nn.Module):
    """Encoder with global attention, four scales of four depths, UPer head, auxiliary head.

    Args:
        num_classes: number of classes of pixels.
        img_size, patch_size: sides of the square image and its patches, in pixels.
        embed_dim, depth, num_heads: width, blocks and attention heads of the encoder.
        drop_path: rate of stochastic depth in the last block.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks.
        layer_scale: initial factors of the residual branches, which are trained; None: none.
        relative: "table", a bias of attention for each offset, block and head, as in BEiT; or
            "none".
        out_blocks: numbers (from 0) of the blocks whose features are taken; None: those published
            for 12 and 24 blocks, see `default_blocks`.
        channels: number of channels of the UPer head; None: the encoder's width.
        auxiliary_channels: number of channels of the auxiliary head.
        dropout: share of the channels that is zeroed before both classifiers, in training.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        img_size: int = 512,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        relative: Literal["none", "table"] = "table",
        out_blocks: Sequence[int] | None = None,
        channels: int | None = None,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 2 <= num_classes <= IGNORE:
            raise UserError(f"a segmenter needs 2 to {IGNORE} classes, not {num_classes}")
        blocks = default_blocks(depth) if out_blocks is None else tuple(out_blocks)
        if len(blocks) != 4:
            raise UserError(f"out_blocks {list(blocks)} must be 4 blocks, one for each scale")
        self.num_classes, self.img_size = num_classes, img_size
        self.backbone = DenseEncoder(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
            mlp_ratio=mlp_ratio,
            out_blocks=blocks,
            relative=relative,
            class_token=True,
            layer_scale=layer_scale,
        )
        self.neck = FourScales(embed_dim, NORMS["batch"])
        width = channels or embed_dim
        self.head = UperHead(embed_dim, width, num_classes, dropout)
        self.auxiliary = AuxiliaryHead(embed_dim, auxiliary_channels, num_classes, dropout)
        for module in self.modules():
            if module is not self:
                self.initialize_module(module)

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if any(module is inner for inner in self.backbone.modules()):
            self.backbone.initialize_module(module)
        elif module is self.head.classifier or module is self.auxiliary[-1]:
            nn.init.normal_(module.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d | CountedBatchNorm):
            module.reset_parameters()

    def set_activation_checkpointing(
        self, every: Literal["none", "full"] | int, offload: bool = False
    ) -> None:
        """Recompute blocks of the encoder; see `Encoder.set_activation_checkpointing`."""
        self.backbone.set_activation_checkpointing(every, offload)

    def layer_of(self, name: str) -> int:
        """Return the number of a parameter's layer, for layer-wise decay.

        It is 0 for class token, position and patch embedding; k + 1 for block k with its table of
        relative positions; depth + 1 for neck and heads.
        """
        if name.startswith("backbone."):
            return self.backbone.layer_of(name.removeprefix("backbone."))
        return len(self.backbone.blocks) + 1

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss where labels are given, and logits otherwise.

        Args:
            images: float32 [B, 3, S, S], normalised.
            labels: uint8 or int64 [B, S, S], classes from 0, or `IGNORE`.

        Returns:
            The loss, a float32 scalar: the head's loss plus 0.4 times the auxiliary head's. Or the
            logits of each pixel, float32 [B, classes, S, S].
        """
        maps = self.neck(self.backbone(images))
        if labels is None:
            return upsampled(self.head(maps), images.shape[2:])
        return pixel_loss(self.head(maps), labels) + 0.4 * pixel_loss(
            self.auxiliary(maps[2]), labels
        )


def default_blocks(depth: int) -> tuple[int, ...]:
    """List the blocks whose features are taken: 3, 5, 7, 11 of 12 blocks; 7, 11, 15, 23 of 24.

    Raises:
        UserError: 6 does not divide the depth.
    """
    if depth % 6:
        raise UserError(
            f"depth {depth} is no multiple of 6; say which four blocks' features are taken: "
            "out_blocks"
        )
    return tuple(depth * sixths // 6 - 1 for sixths in (2, 3, 4, 6))


def upsampled(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize logits [B, classes, h, w] bilinearly, in fp32, to `size`, rows and columns."""
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Average the cross-entropy in fp32 over all pixels, ignored ones included.

    mmsegmentation does the same, and the published learning rate is meant for it: PyTorch's own
    mean would divide by the number of pixels that are not ignored.

    Args:
        logits: [B, classes, H, W].
        labels: uint8 or int64 [B, H, W], classes from 0, or `IGNORE`.

    Returns:
        float32 scalar.
    """
    labels = labels.long()
    full = upsampled(logits, labels.shape[1:])
    return F.cross_entropy(full, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


def sliding_logits(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    window: int,
    stride: int,
    at_once: int = 1,
) -> torch.Tensor:
    """Compute the logits of images of any size: averages over overlapping square windows.

    The last window of a row or column is shifted in, so that it ends with the image. An image
    smaller than the window is filled up with zeros, the mean colour.

    Args:
        logits_of: model, from float32 [B, 3, window, window] to float32
            [B, classes, window, window].
        images: float32 [B, 3, H, W], normalised.
        window, stride: side of a window, and distance between windows, in pixels.
        at_once: number of windows of one image that go through the model together.

    Returns:
        float32 [B, classes, H, W].
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, window - width), 0, max(0, window - height)))
    places = [
        (..., slice(top, top + window), slice(left, left + window))
        for top in window_starts(images.shape[2], window, stride)
        for left in window_starts(images.shape[3], window, stride)
    ]
    total: torch.Tensor | None = None
    count = images.new_zeros(images.shape[2:])
    for start in range(0, len(places), at_once):
        some = places[start : start + at_once]
        logits = logits_of(torch.cat([images[place] for place in some]))
        for place, part in zip(some, logits.split(len(images)), strict=True):
            if total is None:
                total = part.new_zeros(*part.shape[:2], *images.shape[2:])
            total[place] += part
            count[place[1:]] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """List the places at which the windows along a side of `length` pixels begin."""
    number = max(0, -(-(length - window) // stride)) + 1
    return [min(i * stride, max(0, length - window)) for i in range(number)]
