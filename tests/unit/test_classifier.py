"""The classifier: keys and outputs as the authors' and timm's, initial weights, what is trained."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mae_scale.errors import UserError
from mae_scale.models import Classifier, build_classifier, build_mae
from mae_scale.models.encoder import drop_path_rates

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3}


def small(**overrides: object) -> Classifier:
    return build_classifier("mae_vit_tiny_patch16", 7, **{**SMALL, **overrides})


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_is_timms_vision_transformer(pool: str) -> None:
    """The keys are timm's and, with the same weights, so are the logits."""
    ours = small(pool=pool).eval()
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=7,
        global_pool="avg" if pool == "mean" else "token",
    ).eval()  # fmt: skip
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    state["head.weight"] = torch.randn_like(state["head.weight"])
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_shares_the_encoder_of_the_autoencoder() -> None:
    for name in ("base_patch16", "large_patch16", "huge_patch14"):
        with torch.device("meta"):
            mae = build_mae(f"mae_vit_{name}").state_dict()
            classifier = build_classifier(f"mae_vit_{name}", 1000, pool="token").state_dict()
        for key, value in classifier.items():
            assert key.startswith("head.") or mae[key].shape == value.shape


def test_initial_head_and_drop_path() -> None:
    torch.manual_seed(0)
    model = build_classifier("mae_vit_base_patch16", 1000, depth=1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()
    assert model.pos_embed.requires_grad
    probe = build_classifier("mae_vit_base_patch16", 1000, depth=1, head="probe")
    assert probe.head[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert [key for key in probe.state_dict() if key.startswith("head.")] == [
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked",
        "head.1.weight", "head.1.bias",
    ]  # fmt: skip
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.1, 1) == [0]
    dropping = small(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in dropping.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


def test_an_mlp_head_has_one_hidden_layer() -> None:
    model = small(head="mlp")
    keys = [key for key in model.state_dict() if key.startswith("head.")]
    assert keys == ["head.fc1.weight", "head.fc1.bias", "head.fc2.weight", "head.fc2.bias"]
    assert model.head.fc1.out_features == 192
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert 0 < model.head.fc2.weight.abs().max() < 1e-4 < model.head.fc1.weight.abs().max()


def test_recomputed_blocks_drop_the_same_paths() -> None:
    model = small(drop_path=0.5)
    images = torch.randn(8, 3, 32, 32)
    grads = []
    for every in ("none", "full"):
        model.set_activation_checkpointing(every)
        model.zero_grad()
        torch.manual_seed(3)
        model(images).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        (0, {"head"}),
        (0.5, {"head", "fc_norm", "blocks.2.norm2", "blocks.2.mlp"}),
        (1, {"head", "fc_norm", "blocks.2"}),
        (2, {"head", "fc_norm", "blocks.1", "blocks.2"}),
    ],
)
def test_partial_tuning(blocks: float, trained: set[str]) -> None:
    model = small()
    model.tune_last(blocks)
    for name, parameter in model.named_parameters():
        expected = any(name.startswith(f"{prefix}.") for prefix in trained)
        assert parameter.requires_grad is expected, name


@pytest.mark.parametrize("blocks", [-1, 0.3, 1.5, 4])
def test_partial_tuning_of_another_number(blocks: float) -> None:
    with pytest.raises(UserError, match=r"must be 0, 0.5 or a whole number up to the 3 blocks"):
        small().tune_last(blocks)


@pytest.mark.slow
def test_bf16_stands_activations_that_fp16_does_not() -> None:
    """Activations of 1e5 with 28 x 28 patches, as at 448 pixels, give no NaN; the loss is in
    fp32."""
    torch.manual_seed(0)
    outputs = {}
    for dtype in (torch.float16, torch.bfloat16):
        model = build_classifier("mae_vit_tiny_patch16", 10, img_size=448, depth=2)
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.fc1.weight *= 40
                block.mlp.fc2.weight *= 4000
        model.to(dtype)
        largest = []
        model.blocks[0].register_forward_hook(lambda *call, into=largest: into.append(call[2]))
        logits = model(torch.randn(2, 3, 448, 448))
        assert logits.dtype == torch.float32 and largest[0].shape == (2, 785, 192)
        outputs[dtype] = largest[0].float().abs().max(), logits
        if dtype == torch.bfloat16:
            nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not outputs[torch.float16][1].isfinite().all()
    assert outputs[torch.bfloat16][0] > 65504 and outputs[torch.bfloat16][1].isfinite().all()
