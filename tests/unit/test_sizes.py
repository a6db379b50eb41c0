"""Heads and MLP ratio as config keys, and messages that name keys where models name arguments."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from mae_scale.config.identity import identity_hash
from mae_scale.config.keys import key_names
from mae_scale.config.parsing import parse
from mae_scale.errors import UserError, renamed
from mae_scale.models import build_classifier, timm_form
from mae_scale.tasks.task import TASKS

NEEDED = ["--run_dir=r", "--data.train=s"]


def read(task: str, *arguments: str) -> Any:
    return parse(TASKS[task].config, [*NEEDED, *arguments], f"mae-scale {task}")


@pytest.mark.parametrize("task", TASKS)
def test_heads_and_mlp_ratio_are_keys(task: str) -> None:
    small = ["--model.depth=12", "--model.patch_size=16", "--model.embed_dim=96"]
    config = read(task, *small, "--model.num_heads=3", "--model.mlp_ratio=2")
    with torch.device("meta"):
        model = TASKS[task].module.build(config, 7)
    block = getattr(model, "backbone", model).blocks[0]
    assert block.attn.num_heads == 3
    assert block.mlp.fc1.out_features == 192
    assert len({identity_hash(c) for c in (config, read(task, *small))}) == 2


def test_the_decoder_has_heads_of_its_own() -> None:
    config = read("pretrain", "--model.decoder_num_heads=4", "--model.mlp_ratio=1.5")
    with torch.device("meta"):
        model = TASKS["pretrain"].module.build(config)
    block = model.decoder_blocks[0]
    assert block.attn.num_heads == 4
    assert block.mlp.fc1.out_features == 768


def test_messages_name_the_keys() -> None:
    config = read("pretrain", "--model.embed_dim=256")
    with pytest.raises(UserError) as error, renamed(key_names(config)):
        TASKS["pretrain"].module.build(config)
    assert str(error.value) == (
        "model.embed_dim 256 does not divide among model.num_heads 12; nearest numbers of heads "
        "that fit: 8, 16"
    )


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("target 'x' must be pixels", "model.target 'x' must be pixels"),
        ("a target has no name", "a target has no name"),
        ("train.micro_batch_size 3", "train.micro_batch_size 3"),
        ("it is 3 (micro_batch_size 3)", "it is 3 (train.micro_batch_size 3)"),
        ("decoder_embed_dim 3 is odd", "model.decoder_embed_dim 3 is odd"),
    ],
)
def test_words_of_a_sentence_are_no_names(message: str, shown: str) -> None:
    with pytest.raises(UserError) as error, renamed(key_names(read("pretrain"))):
        raise UserError(message)
    assert str(error.value) == shown


def test_timm_gets_the_same_heads_and_mlps() -> None:
    torch.manual_seed(0)
    name = "mae_vit_tiny_patch16"
    sizes = {"img_size": 32, "embed_dim": 96, "depth": 2, "num_heads": 6, "mlp_ratio": 2.5}
    model = build_classifier(name, 5, **sizes).eval()
    theirs, arguments = timm_form.arguments(name, model)
    other = timm.create_model(theirs, **arguments).eval()
    other.load_state_dict(timm_form.to_timm(model.state_dict(), theirs, arguments))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)
