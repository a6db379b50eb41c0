"""Weights of pre-training, the authors, timm and Hugging Face go into encoders of dense tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_scale.errors import UserError
from mae_scale.models import build_classifier, build_mae
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.dense_weights import fit_to_dense, fit_to_dense_model
from mae_scale.models.detector import Detector
from mae_scale.models.weights import read_weights

SIZES = {"embed_dim": 192, "depth": 4, "num_heads": 3}
MAE = {"img_size": 64, "depth": 4, "decoder_depth": 1}
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def encoder(**more: Any) -> DenseEncoder:
    """Make an encoder without windows and relative positions, which computes what pre-training's
    does."""
    return DenseEncoder(**{**SIZES, "img_size": 64, "out_blocks": (3,), **more}).eval()


def test_an_encoder_of_pretraining_computes_the_same(tmp_path: Path) -> None:
    mae = build_mae("mae_vit_tiny_patch16", **MAE).eval()
    torch.save({"model": mae.state_dict(), "epoch": 800}, tmp_path / "mae.pth")
    model = encoder(relative="table", class_token=True, layer_scale=1.0)
    model.load_state_dict(fit_to_dense(read_weights(tmp_path / "mae.pth"), model), strict=False)
    tokens = mae.prepend_cls_token(mae.embed_patches(IMAGES))
    expected = mae.run_blocks(mae.blocks, tokens)[:, 1:].transpose(1, 2).reshape(1, 192, 4, 4)
    assert (model(IMAGES)[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("source", ["mae", "classifier", "timm", "huggingface"])
@pytest.mark.parametrize("positions", ["fixed", "trained"])
def test_all_sources_give_the_blocks(source: str, positions: Any, tmp_path: Path) -> None:
    if source == "mae":
        state = build_mae("mae_vit_tiny_patch16", **MAE).state_dict()
    elif source == "classifier":
        state = build_classifier("mae_vit_tiny_patch16", 5, img_size=64, depth=4).state_dict()
    elif source == "timm":
        theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=7)
        state = theirs.state_dict()
    else:
        config = ViTMAEConfig(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=64,
            decoder_num_hidden_layers=1,
            decoder_hidden_size=64,
        )
        ViTMAEForPreTraining(config).save_pretrained(tmp_path)
        state = read_weights(tmp_path)
    relative = "shared" if positions == "fixed" else "decomposed"
    model = Detector(
        num_classes=3,
        img_size=128,
        channels=16,
        hidden=32,
        window=4,
        relative=relative,
        positions=positions,
        pos_grid=4 if positions == "trained" else None,
        **SIZES,
    )
    own = model.backbone.pos_embed.clone()
    result = model.load_state_dict(fit_to_dense_model(state, model), strict=False)
    fresh = [k for k in result.missing_keys if k.startswith("backbone.") and "rel_pos" not in k]
    assert fresh == (["backbone.pos_embed"] if positions == "fixed" else [])
    assert torch.equal(model.backbone.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])
    wanted = own if positions == "fixed" else state["pos_embed"][:, 1:]
    assert torch.equal(model.backbone.pos_embed, wanted)


def test_patches_of_14_pixels_become_patches_of_16() -> None:
    mae = build_mae("mae_vit_tiny_patch16", **{**MAE, "img_size": 56, "patch_size": 14})
    model = encoder()
    model.load_state_dict(fit_to_dense(mae.state_dict(), model))
    # For an enlarged patch the resampled projection gives the output of the first one.
    small = torch.nn.functional.interpolate(
        torch.randn(1, 3, 4, 4), (14, 14), mode="bicubic", antialias=True
    )
    large = torch.nn.functional.interpolate(small, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = mae.patch_embed.proj(small).flatten()
        found = model.patch_embed.proj(large).flatten()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_run_of_the_same_task_gives_its_heads() -> None:
    sizes = {"num_classes": 3, "img_size": 128, "channels": 16, "hidden": 32, **SIZES}
    first, second = Detector(**sizes), Detector(**sizes)
    state = fit_to_dense_model(first.state_dict(), second)
    assert second.load_state_dict(state).missing_keys == []
    encoder_only = fit_to_dense_model(first.state_dict(), second, new_head=True)
    assert all(key.startswith("backbone.") for key in encoder_only)
    other = Detector(**{**sizes, "num_classes": 4})
    with pytest.raises(UserError, match=r"cls_score.weight is \[4, 32\], expected \[5, 32\]"):
        fit_to_dense_model(first.state_dict(), other)


def test_relative_positions_of_another_size_are_interpolated() -> None:
    first = encoder(relative="decomposed", img_size=96)
    torch.nn.init.normal_(first.blocks[0].attn.rel_pos_h)
    state = fit_to_dense(first.state_dict(), encoder(relative="decomposed"))
    assert state["blocks.0.attn.rel_pos_h"].shape == (7, 64)
    assert state["pos_embed"].shape == (1, 16, 192)


def test_weights_that_do_not_fit_are_named() -> None:
    state = build_mae("mae_vit_tiny_patch16", **MAE).state_dict()
    state["blocks.0.norm1.weight"] = torch.zeros(5)
    state["extra"] = torch.zeros(1)
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(UserError) as error:
        fit_to_dense(state, encoder())
    for part in (
        "missing: blocks.1.mlp.fc1.bias",
        "not known to the model: extra",
        "[5], expected",
    ):
        assert part in str(error.value)
