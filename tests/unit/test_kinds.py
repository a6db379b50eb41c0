"""The parameters that the published recipes decay."""

from __future__ import annotations

import torch

from mae_scale.models.detector import build_detector
from mae_scale.models.kinds import parameter_kinds


def kinds(**switches: object) -> dict[str, str]:
    with torch.device("meta"):
        model = build_detector("mae_vit_base_patch16", 80, **switches)
    found = parameter_kinds(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def test_vitdet_decays_biases_relative_positions_and_norms_of_maps() -> None:
    found = kinds(pos_grid=14)
    free = {name for name, kind in found.items() if kind in ("layer_norm", "position")}
    norms = {
        f"backbone.blocks.{i}.norm{k}.{part}"
        for i in range(12)
        for k in (1, 2)
        for part in ("weight", "bias")
    }
    assert free == norms | {"backbone.pos_embed"}
    assert found["backbone.blocks.0.attn.rel_pos_h"] == "relative"
    assert found["pyramid.levels.0.1.weight"] == found["roi_heads.box_head.0.1.bias"]
    assert found["pyramid.levels.0.1.weight"] == "channel_norm"
    assert found["backbone.blocks.0.attn.qkv.bias"] == found["rpn.head.cls_logits.bias"] == "bias"


def test_li_2021_decays_biases_but_no_norm_and_no_position() -> None:
    found = kinds(pyramid="fpn", norm="batch", relative="shared", positions="fixed", window=16)
    free = ("layer_norm", "channel_norm", "position", "relative")
    decayed = {name for name, kind in found.items() if kind not in free}
    assert not any("norm" in name or "pos" in name for name in decayed)
    assert "pyramid.neck.scales.0.1.weight" not in decayed  # GroupNorm
    assert "pyramid.fpn.inner_blocks.0.1.weight" not in decayed  # BatchNorm
    assert {"backbone.blocks.3.mlp.fc1.bias", "backbone.patch_embed.proj.bias"} <= decayed
    assert found["backbone.rel_pos_global.table"] == "relative"
