"""Feature maps of several strides from the one stride of a plain Vision Transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from timm.layers import lecun_normal_
from torch import nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mae_scale.models.norms import NORMS


class FourScales(nn.Module):
    """Four maps of one stride, resized 4 times, 2 times, once and half as large.

    Args:
        width: number of channels of the maps, which they keep.
        norm: function that makes the norm between the two deconvolutions of the largest map.
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_double(width, width), norm(width), nn.GELU(), _double(width, width)),
                _double(width, width),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turn four maps [B, D, H, W] into maps with 4 H, 2 H, H and H / 2 rows."""
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class FpnPyramid(nn.Module):
    """The pyramid of Li et al. 2021: features of four depths, four scales, an FPN with norms.

    Args:
        width: number of channels of the encoder's features; a multiple of 32, for GroupNorm.
        channels: number of channels of the pyramid's maps.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.neck = FourScales(width, lambda channels: nn.GroupNorm(32, channels))
        self.fpn = FeaturePyramidNetwork(
            [width] * 4, channels, LastLevelMaxPool(), norm_layer=NORMS["batch"]
        )

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if isinstance(module, nn.ConvTranspose2d):
            lecun_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            module.reset_parameters()

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turn features of four depths, of stride s, into five maps of strides s / 4 to 4 s."""
        maps = OrderedDict((str(i), x) for i, x in enumerate(self.neck(features)))
        return list(self.fpn(maps).values())


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet: all maps from the last features, no top-down path.

    Args:
        width: number of channels of the encoder's features; a multiple of 4.
        channels: number of channels of the pyramid's maps.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter, norm = width // 2, width // 4, NORMS["layer"]

        def level(inputs: int, *scale: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                *scale,
                Conv2dNormActivation(inputs, channels, 1, norm_layer=norm, activation_layer=None),
                Conv2dNormActivation(channels, channels, 3, norm_layer=norm, activation_layer=None),
            )

        self.levels = nn.ModuleList(
            [
                level(quarter, _double(width, half), norm(half), nn.GELU(), _double(half, quarter)),
                level(half, _double(width, half)),
                level(width),
                level(width, nn.MaxPool2d(2)),
            ]
        )

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if isinstance(module, nn.ConvTranspose2d | nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()  # Detectron2 leaves PyTorch's initial values

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turn the last features, of stride s, into five maps of strides s / 4 to 4 s."""
        maps = [level(features[-1]) for level in self.levels]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def _double(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)
