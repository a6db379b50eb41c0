"""A rank of test_partial_tuning.py: losses of each part that fine-tuning can train, by stage."""

from __future__ import annotations

import json

import torch

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import TrainConfig
from mae_scale.launch.distributed import process_group
from mae_scale.models import build_classifier
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine, fill_in
from mae_scale.world import World

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}


def losses(world: World, blocks: float, stage: str, every: str | int) -> list[float]:
    train = TrainConfig(global_batch_size=2 * world.size, micro_batch_size=2)
    config = fill_deepspeed_config(stage, train, world, "fp32")
    with torch.device("meta"):
        model = build_classifier("mae_vit_tiny_patch16", num_classes=5, **SIZES)
    model.tune_last(blocks)
    model.set_activation_checkpointing(every, False)
    fill_in(model, 0, config)
    engine = build_engine(model, FinetuneOptimConfig(layer_decay=0.5, clip_grad=1.0), config)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    torch.manual_seed(world.rank)
    found = []
    for _ in range(4):
        loss = engine(torch.rand(2, 3, 32, 32)).logsumexp(1).mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


world = World.from_environment()
with process_group(world, 600):
    for blocks in (0, 0.5, 1, 2, 3):
        for every in ("none", "full"):
            rows = [
                losses(world, blocks, stage, every)
                for stage in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
            ]
            if world.rank == 0:
                print(json.dumps({"blocks": blocks, "every": every, "losses": rows}), flush=True)
