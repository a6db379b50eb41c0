"""Be rank 0 and then rank 511 of 512 in one process, in PyTorch's process group that sends
nothing."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import TrainConfig
from mae_scale.launch.distributed import _destroy
from mae_scale.models import build_classifier
from mae_scale.train import engine as engines
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.deepspeed_state import layout, masters
from mae_scale.train.ds import deepspeed
from mae_scale.train.nonfinite import StepGuard
from mae_scale.world import World

RANKS = 512
OPTIM = FinetuneOptimConfig(layer_decay=0.65, ema_decay=0.99, clip_grad=0.1)
TRAIN = TrainConfig(global_batch_size=2 * RANKS, micro_batch_size=2)


def take_a_step(stage: int, rank: int) -> dict[str, Any]:
    """Build an engine, take a step, and read the optimiser's state dict."""
    world = World(rank=rank, size=RANKS, local_rank=rank % 8, local_size=8)
    config = fill_deepspeed_config(f"zero{stage}", TRAIN, world, "bf16")
    with torch.device("meta"):
        model = build_classifier(
            "mae_vit_tiny_patch16", num_classes=5, img_size=32, patch_size=16, embed_dim=12,
            depth=2, drop_path=0.1,
        )  # fmt: skip
    engines.fill_in(model, 0, config)
    for parameter in model.parameters() if stage == 3 else ():
        # This group gathers copies of the rank's own share, padding included.
        parameter.ds_tensor.data.fill_(0.01)
    engine = engines.build_engine(model, OPTIM, config)
    guard = StepGuard(engine, OPTIM.clip_grad)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    before = [master.detach().clone() for master in masters(engine)]
    images = torch.rand(2, 3, 32, 32).bfloat16()
    engine.backward(engine(images).float().square().mean())
    engine.step()
    state = engine.optimizer.state_dict()
    assert state["zero_stage"] == stage and state["partition_count"] in (RANKS, [RANKS] * 8), state
    assert math.isfinite(float(guard.grad_norm))
    after = masters(engine)
    return {
        "layout": layout(engine),
        "sizes": [master.numel() for master in after],
        "moved": sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)),
    }


os.environ["LOCAL_RANK"] = "0"
# A group that sends nothing can neither exchange objects nor compare them.
engines.on_rank0 = lambda function: function()
zero = deepspeed.runtime.zero
for module in (zero.parameter_offload, zero.partitioned_param_coordinator):
    module.assert_ints_same_as_other_ranks = lambda ints: None
for stage in (1, 2, 3):
    found = []
    for rank in (0, RANKS - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        found.append(take_a_step(stage, rank))
        _destroy()
    print(stage, found, flush=True)
    assert found[0]["layout"] == found[1]["layout"]
    # Some groups have fewer values than ranks: the last rank then has padding only.
    assert 0 < found[1]["moved"] < found[0]["moved"], found
    print(f"stage {stage} works", flush=True)
