"""A rank of test_fewer_operators.py: states after DeepSpeed's own steps and after ours."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import TrainConfig
from mae_scale.launch.distributed import process_group
from mae_scale.models import build_mae
from mae_scale.train import engine as engines
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.nonfinite import StepGuard
from mae_scale.world import World

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "decoder_depth": 1}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("zero1", 1, {}),
    ("zero1", 2, {}),
    ("zero1", 2, {"overlap_comm": True, "reduce_bucket_size": 9000}),
    ("zero2", 1, {}),
    ("zero2", 2, {"reduce_bucket_size": 9000}),  # several buckets; one matrix is larger
    ("zero2", 2, {"overlap_comm": False, "round_robin_gradients": True}),
]


def tensors(value: object) -> list[torch.Tensor]:
    """List all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def digest(world: World, name: str, accumulation: int, zero: dict[str, Any]) -> str:
    """Hash the weights, master weights, moments and norms after three steps."""
    batch = 2 * accumulation * world.size
    train = TrainConfig(global_batch_size=batch, micro_batch_size=2)
    config = fill_deepspeed_config(name, train, world, "bf16")
    config["zero_optimization"] |= zero
    torch.manual_seed(0)
    model = build_mae("mae_vit_tiny_patch16", **SIZES)
    model.layer_of = lambda name: (  # type: ignore
        2 if "decoder" in name or name == "head" else int("blocks.1" in name)
    )
    engine = engines.build_engine(model, FinetuneOptimConfig(layer_decay=0.5), config)
    assert (nn.functional.linear is PYTORCHS) is (name != "zero3")
    guard = StepGuard(engine)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    torch.manual_seed(world.rank)
    found = hashlib.sha256()
    for _ in range(3):
        for _ in range(accumulation):
            loss, _, _ = engine(torch.rand(2, 3, 32, 32), torch.rand(2, model.num_patches))
            engine.backward(loss)
            engine.step()
        found.update(str(float(guard.grad_norm)).encode())
    weights = list(engine.module.parameters())
    for tensor in tensors([weights, engine.optimizer.state_dict()]):
        found.update(tensor.float().numpy().tobytes())
    return found.hexdigest()


OURS, PYTORCHS = engines.use_fewer_operators, nn.functional.linear
world = World.from_environment()
with process_group(world, 600):
    digest(world, "zero3", 1, {})  # its linear layers must not stay in place
    for case in CASES:
        found = set()
        for way in (OURS, lambda optimizer: None):
            engines.use_fewer_operators = way
            found.add(digest(world, *case))
        print(f"{world.rank} {case}: {'same' if len(found) == 1 else 'other'} bits", flush=True)
