"""Parameter groups by the paper's formula, LARS by its paper's, and schedule times layer decay."""

from __future__ import annotations

import pytest
import torch

from mae_scale.config.classification import FinetuneOptimConfig, LarsConfig
from mae_scale.config.deepspeed import check_stage
from mae_scale.config.sections import OptimConfig
from mae_scale.errors import UserError
from mae_scale.models import build_classifier, build_mae
from mae_scale.train.optimizers import (
    GuardedLars,
    make_optimizer,
    optimizer_groups,
    optimizer_order,
)


@pytest.mark.parametrize(("size", "decay"), [("base_patch16", 0.65), ("huge_patch14", 0.75)])
def test_layer_decay_is_table_9s(size: str, decay: float) -> None:
    """scale = decay ** (depth + 1 - id); the embedding has id 0, block k id k + 1, the rest depth +
    1."""
    with torch.device("meta"):
        model = build_classifier(f"mae_vit_{size}", 1000)
    depth = len(model.blocks)
    name_of = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in optimizer_groups(model, FinetuneOptimConfig(layer_decay=decay)):
        for parameter in group["params"]:
            seen[name_of[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert seen.keys() == set(name_of.values())
    for name, (scale, weight_decay) in seen.items():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1
        assert scale == pytest.approx(decay ** (depth + 1 - layer), rel=1e-12), name
        plain = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert weight_decay == (0 if plain else 0.05), name


def test_without_layer_decay_there_are_two_groups() -> None:
    model = build_classifier("mae_vit_tiny_patch16", 5, img_size=32, patch_size=8, depth=2)
    assert len(optimizer_groups(model, FinetuneOptimConfig())) == 2
    model.tune_last(0.5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for decay in (1.0, 0.75):
        optim = FinetuneOptimConfig(layer_decay=decay)
        assert sorted(optimizer_order(model, optim)) == sorted(trained)


def test_pretrainings_groups_are_as_they_were() -> None:
    """The group without decay comes first, then the rest with the class token: checkpoints rely on
    it."""
    mae = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, depth=2)
    first, second = optimizer_groups(mae, OptimConfig())
    assert (first["weight_decay"], second["weight_decay"]) == (0.0, 0.05)
    assert all(p.ndim == 1 for p in first["params"]) and all(p.ndim > 1 for p in second["params"])
    assert any(p is mae.cls_token for p in second["params"])


def lars_step(p: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> torch.Tensor:
    """Take a step of You et al., arXiv 1708.03888, with trust coefficient 0.001 and momentum
    0.9."""
    if p.ndim > 1:
        g = g * 0.001 * p.norm() / g.norm()
    buffer.mul_(0.9).add_(g)
    return p - lr * buffer


def test_lars_adapts_matrices_only() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    optimizer = make_optimizer(layer, LarsConfig())
    assert isinstance(optimizer, GuardedLars)
    values = {n: p.detach().clone() for n, p in layer.named_parameters()}
    buffers = {n: torch.zeros_like(p) for n, p in values.items()}
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * (step + 1)
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            values[name] = lars_step(
                values[name], parameter.grad, buffers[name], lr=0.5 * (step + 1)
            )
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), values[name])


def test_lars_does_not_apply_a_step_that_is_not_finite() -> None:
    layer = torch.nn.Linear(6, 4)
    optimizer = make_optimizer(layer, LarsConfig())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0
    for found_inf in (0.0, 1.0):
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        for parameter in layer.parameters():
            bad = torch.full_like(parameter, torch.nan)
            parameter.grad = bad if found_inf else torch.randn_like(parameter)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert parameter.isfinite().all()
            assert torch.equal(parameter, before[name]) is bool(found_inf)
            assert optimizer.state[parameter]["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lars_under_a_zero_stage_that_breaks_its_norms(stage: int) -> None:
    with pytest.raises(UserError, match=rf"ZeRO-{stage} .* norms of whole matrices; use zero0"):
        check_stage(LarsConfig(), stage)


def test_lars_adds_the_decay_to_the_gradient_before_its_norm() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = make_optimizer(layer, LarsConfig(weight_decay=0.3))
    optimizer.param_groups[-1]["lr"] = optimizer.param_groups[0]["lr"] = 0.5
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    gradient = torch.randn(3, 5)
    layer.weight.grad, layer.bias.grad = gradient.clone(), torch.ones(3)
    optimizer.step()
    decayed = gradient + 0.3 * weight
    moved = 0.5 * 0.001 * weight.norm() / decayed.norm() * decayed
    torch.testing.assert_close(layer.weight.detach(), weight - moved)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.3]
