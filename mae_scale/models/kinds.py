"""Kinds of parameters; recipes differ in which kinds have no weight decay."""

from __future__ import annotations

from typing import Literal

from timm.layers import LayerNorm2d, LayerScale
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mae_scale.models.dense import RelativeTable

Kind = Literal[
    "weight", "bias", "scale", "layer_norm", "channel_norm", "position", "class_token", "relative"
]


def parameter_kinds(model: nn.Module) -> dict[str, Kind]:
    """Return the kind of each parameter by its name.

    "layer_norm": both parameters of a LayerNorm over tokens. "channel_norm": both parameters of a
    norm of feature maps, over channels, groups or a batch. "position": absolute position
    embeddings. "relative": tables and vectors of relative positions. "scale": LayerScale. "bias":
    all other biases. "weight": all other parameters.
    """
    kinds: dict[str, Kind] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            kinds[name] = _kind(module, name.rpartition(".")[2])
    return kinds


def _kind(module: nn.Module, name: str) -> Kind:
    if isinstance(module, LayerNorm2d | nn.GroupNorm | _BatchNorm):
        return "channel_norm"
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    if isinstance(module, RelativeTable) or name in ("rel_pos_h", "rel_pos_w"):
        return "relative"
    if isinstance(module, LayerScale):
        return "scale"
    if name == "bias":
        return "bias"
    if name == "cls_token":
        return "class_token"
    return "position" if name == "pos_embed" else "weight"
