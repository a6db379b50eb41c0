"""A rank of test_nonfinite.py: steps with a NaN on one rank change nothing, under all stages."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.models import build_mae
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine
from mae_scale.train.nonfinite import StepGuard

OPTIM = OptimConfig(base_lr=1e-3)


def tensors(value: object) -> list[torch.Tensor]:
    """Copy all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    return []


def check(world: World, name: str, precision: str, accumulation: int) -> None:
    batch = 2 * world.size * accumulation
    train = TrainConfig(global_batch_size=batch, micro_batch_size=2)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "decoder_depth": 1}
    model = build_mae("mae_vit_tiny_patch16", **sizes)
    engine = build_engine(model, OPTIM, fill_deepspeed_config(name, train, world, precision))
    guard = StepGuard(engine)
    parameter = next(p for n, p in model.named_parameters() if n.endswith("decoder_pred.weight"))
    spoil = {"loss": False, "gradient": False}
    parameter.register_hook(lambda grad: grad * float("inf") if spoil["gradient"] else None)

    def step(kind: str = "") -> float:
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3
        for micro in range(accumulation):
            mine = world.rank == world.size - 1 and micro == 0
            spoil["gradient"] = kind == "gradient" and mine
            loss, _, _ = engine(torch.rand(2, 3, 32, 32), torch.rand(2, model.num_patches))
            if kind == "loss" and mine:
                loss = loss * float("nan")
            shared = loss.detach().double()
            engine.backward(loss)
            dist.all_reduce(shared)
            guard.watch(shared)
            engine.step()
        return float(guard.grad_norm)

    def state() -> list[torch.Tensor]:
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        return tensors([weights, engine.optimizer.state_dict()])

    assert 0 < step() < 1e9
    before = state()
    for kind in ("loss", "gradient"):
        norm = step(kind)
        assert not 0 < norm < 1e9, (name, precision, kind, norm)
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old, new), (name, precision, kind)
    assert 0 < step() < 1e9
    assert any(not torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    if world.rank == 0:
        print(f"{name} {precision} x{accumulation} is guarded", flush=True)


world = World.from_environment()
with process_group(world, 600):
    for arguments in sys.argv[1:]:
        name, precision, accumulation = arguments.split(",")
        check(world, name, precision, int(accumulation))
