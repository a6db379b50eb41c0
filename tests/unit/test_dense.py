"""The encoder for dense tasks, compared with transformers' ViTDet and BEiT, and its switches."""

from __future__ import annotations

import pytest
import torch
from transformers import BeitConfig, BeitModel, VitDetBackbone, VitDetConfig

from mae_scale.errors import UserError
from mae_scale.models.dense import DenseEncoder, RelativeTable, into_windows, out_of_windows

SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 2}


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter a value that changes the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))


def from_vitdet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the weights of transformers' ViTDet under our keys."""
    names = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.projection.": "patch_embed.proj.",
        "encoder.layer.": "blocks.",
        ".attention.": ".attn.",
    }
    result = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        result[key] = value[:, 1:] if key == "pos_embed" else value
    return result


@pytest.mark.parametrize(
    ("img_size", "window", "pos_grid"), [(64, 3, 2), (64, 2, 4), (96, 4, 3), (64, 0, 4)]
)
def test_windows_and_decomposed_positions_are_those_of_vitdet(
    img_size: int, window: int, pos_grid: int
) -> None:
    config = VitDetConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=img_size,
        pretrain_image_size=16 * pos_grid,
        window_size=window,
        window_block_indices=[0, 2] if window else [],
        use_relative_position_embeddings=True,
        out_indices=[1, 3, 4],
        drop_path_rate=0.2,
    )
    theirs = VitDetBackbone(config).eval()
    randomise(theirs)
    ours = DenseEncoder(
        **SIZES,
        img_size=img_size,
        drop_path=0.2,
        out_blocks=(0, 2, 3),
        window=window,
        global_blocks=(1, 3) if window else (),
        relative="decomposed",
        pos_grid=pos_grid,
    ).eval()
    ours.load_state_dict(from_vitdet(theirs.state_dict()))
    images = torch.randn(2, 3, img_size, img_size)
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs(images).feature_maps, strict=True):
            assert (found - expected).abs().max() <= 1e-5
        wide = torch.randn(1, 3, img_size, img_size + 32)
        for found, expected in zip(ours(wide), theirs(wide).feature_maps, strict=True):
            assert (found - expected).abs().max() <= 1e-5


def test_tables_in_each_block_and_layer_scale_are_those_of_beit() -> None:
    config = BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.5,
        layer_norm_eps=1e-6,
    )
    theirs = BeitModel(config, add_pooling_layer=False).eval()
    randomise(theirs)
    ours = DenseEncoder(
        **SIZES,
        img_size=64,
        out_blocks=(0, 1, 2, 3),
        relative="table",
        class_token=True,
        layer_scale=0.5,
    ).eval()
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in {
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.cls_token": "cls_token",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "layers.": "blocks.",
            "lambda_1": "ls1.gamma",
            "lambda_2": "ls2.gamma",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "attention.o_proj": "attn.proj",
            "attention.": "attn.",
            "relative_position_bias.relative_position_bias_table": "attn.rel_pos.table",
        }.items():
            key = key.replace(old, new)
        state[key] = value
    for i in range(4):
        start = f"blocks.{i}.attn"
        parts = [state.pop(f"{start}.{part}_proj.weight") for part in "qkv"]
        state[f"{start}.qkv.weight"] = torch.cat(parts)
        q, v = (state.pop(f"{start}.{part}_proj.bias") for part in "qv")
        state[f"{start}.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    ours.load_state_dict({k: v for k, v in state.items() if "relative_position_index" not in k})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states[1:]
        for found, hidden in zip(ours(images), expected, strict=True):
            wanted = hidden[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
            assert (found - wanted).abs().max() <= 1e-5


def test_shared_tables_are_the_tables_of_all_blocks() -> None:
    shared = DenseEncoder(
        **SIZES, img_size=64, out_blocks=(3,), window=2, global_blocks=(1, 3), relative="shared"
    )
    own = DenseEncoder(
        **SIZES, img_size=64, out_blocks=(3,), window=2, global_blocks=(1, 3), relative="table"
    )
    randomise(shared)
    state = shared.state_dict()
    tables = {
        "window": state.pop("rel_pos_window.table"),
        "global": state.pop("rel_pos_global.table"),
    }
    for i in range(4):
        state[f"blocks.{i}.attn.rel_pos.table"] = tables["global" if i in (1, 3) else "window"]
    own.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    assert (shared(images)[0] - own(images)[0]).abs().max() <= 1e-6


def test_a_table_has_a_row_for_each_offset() -> None:
    index = RelativeTable(3, 1).index()
    assert index[0, 0] == index[4, 4] == 12  # no offset: the middle of the 5 x 5 table
    assert index[0, 8] == 0 and index[8, 0] == 24
    assert index[1, 0] == 13 and index[3, 0] == 17


def test_windows_are_squares_of_the_image_padded_with_zeros() -> None:
    x = torch.arange(1.0, 16.0).reshape(1, 15, 1)  # 3 rows of 5
    windows = into_windows(x, (3, 5), 2)
    assert windows.shape == (6, 4, 1)
    assert windows[0].flatten().tolist() == [1, 2, 6, 7]
    assert windows[2].flatten().tolist() == [5, 0, 10, 0]
    assert torch.equal(out_of_windows(windows, (3, 5), 2), x)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for every in ("none", 2):
        torch.manual_seed(0)
        model = DenseEncoder(
            **SIZES, img_size=64, out_blocks=(1, 3), window=2, global_blocks=(1,), relative="shared"
        )
        randomise(model)
        model.set_activation_checkpointing(every)
        sum(f.square().sum() for f in model(torch.ones(1, 3, 64, 64))).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_fixed_positions_are_not_trained_and_made_for_the_grid() -> None:
    model = DenseEncoder(**SIZES, img_size=64, out_blocks=(3,), positions="fixed")
    assert model.pos_embed.shape == (1, 16, 32)
    assert not model.pos_embed.requires_grad


def test_layers_for_decay() -> None:
    model = DenseEncoder(**SIZES, img_size=64, out_blocks=(3,), relative="table", class_token=True)
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert numbers["cls_token"] == numbers["pos_embed"] == numbers["patch_embed.proj.bias"] == 0
    assert numbers["blocks.0.attn.rel_pos.table"] == 1
    assert numbers["blocks.3.mlp.fc2.bias"] == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out_blocks": (4,)}, "out_blocks 4 must be rising numbers from 0 to 3"),
        ({"out_blocks": ()}, "at least one block"),
        ({"out_blocks": (3,), "window": 2, "class_token": True}, "no place for a class token"),
        ({"out_blocks": (3,), "window": -1}, "window -1"),
        ({"out_blocks": (3,), "positions": "fixed", "pos_grid": 14}, "fit every grid"),
        ({"out_blocks": (3,), "global_blocks": (2, 1)}, "global_blocks 2, 1"),
    ],
)
def test_what_cannot_be_is_said(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DenseEncoder(**SIZES, img_size=64, **wrong)
