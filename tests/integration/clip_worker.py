"""A rank of test_clip_grad.py: clipped steps at every stage, beside those of plain PyTorch."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.models import build_classifier
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.deepspeed_state import EngineState
from mae_scale.train.engine import build_engine
from mae_scale.train.nonfinite import StepGuard
from mae_scale.train.optimizers import make_optimizer

CLIP, LR = 0.5, 1e-2
# AdamW does not depend on the scale of all gradients, but on the ratios between steps. The first
# of these gradients is below the limit.
FACTORS = (0.01, 30.0, 1.0, 300.0)


def loss_of(model: nn.Module, images: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * (model(images) - 1).square().mean()


def plain(model: nn.Module, images: torch.Tensor, clip: float | None) -> tuple[list, list[float]]:
    """Give the weights and gradient norms of PyTorch alone, on the whole batch."""
    model, optim = copy.deepcopy(model), OptimConfig()
    optimizer, norms = make_optimizer(model, optim), []
    for group in optimizer.param_groups:
        group["lr"] = LR
    for factor in FACTORS:
        loss_of(model, images, factor).backward()
        limit = float("inf") if clip is None else clip
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], norms


def check(world: World, name: str, precision: str) -> None:
    torch.manual_seed(0)
    model = build_classifier(
        "mae_vit_tiny_patch16", num_classes=4, img_size=16, patch_size=8, embed_dim=12, depth=2
    )
    nn.init.normal_(model.head.weight, std=0.1)
    images = torch.rand(2 * world.size, 3, 16, 16)
    clipped, norms = plain(model, images, CLIP)
    unclipped, _ = plain(model, images, None)
    train = TrainConfig(global_batch_size=len(images), micro_batch_size=2)
    engine = build_engine(
        model, OptimConfig(), fill_deepspeed_config(name, train, world, precision)
    )
    guard = StepGuard(engine, CLIP)
    for group in engine.optimizer.param_groups:
        group["lr"] = LR
    own = images[2 * world.rank :][:2]
    for factor, norm in zip(FACTORS, norms, strict=True):
        engine.backward(loss_of(engine, own, factor))
        engine.step()
        accuracy = 1e-4 if precision == "fp32" else 0.05
        assert abs(float(guard.grad_norm) / norm - 1) < accuracy, (name, guard.grad_norm, norm)
    state = EngineState(engine)
    found = [state.weight(p).float() for p in engine.module.parameters()]

    def distance(others: list[torch.Tensor]) -> float:
        pairs = zip(found, others, strict=True)
        return float(torch.cat([(a - b).flatten() for a, b in pairs]).norm())

    near, far = distance(clipped), distance(unclipped)
    assert near < far * (1e-3 if precision == "fp32" else 0.5), (name, precision, near, far)
    if world.rank == 0:
        print(f"{name} {precision} is clipped: {near:.2g} beside {far:.2g}", flush=True)


world = World.from_environment()
with process_group(world, 600):
    for case in sys.argv[1:]:
        check(world, *case.split(","))
