"""Counts how often the host waits for the device in one optimiser step; prints JSON.

DeepSpeed's accelerator is the CPU, made to count
`synchronize()`. A read by the host is an operator `_local_scalar_dense`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import TrainConfig
from mae_scale.launch.distributed import process_group
from mae_scale.launch.stopping import StopRequest
from mae_scale.models import build_classifier
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.ds import deepspeed
from mae_scale.train.engine import build_engine
from mae_scale.train.step import Stepper, Wishes
from mae_scale.world import World


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def main(name: str, precision: str) -> None:
    world = World()
    accelerator, waits = deepspeed.accelerator.get_accelerator(), []
    accelerator.synchronize = lambda device_index=None: waits.append(1)
    train = TrainConfig(global_batch_size=4, micro_batch_size=2)
    optim = FinetuneOptimConfig(layer_decay=0.75, ema_decay=0.99, clip_grad=0.1)
    with process_group(world, 600) as watchdog:
        model = build_classifier(
            "mae_vit_tiny_patch16", num_classes=5, img_size=32, patch_size=16, embed_dim=12,
            depth=3, drop_path=0.1,
        )  # fmt: skip
        engine = build_engine(model, optim, fill_deepspeed_config(name, train, world, precision))
        dtype = next(model.parameters()).dtype
        batch = {"image": torch.rand(2, 3, 32, 32).to(dtype), "sample": torch.arange(2)}
        stepper = Stepper(
            engine=engine,
            loss_of=lambda engine, batch, *_: engine(batch["image"]).float().square().mean(),
            world=world, watchdog=watchdog, stop=StopRequest(), seed=0, train=train, optim=optim,
            steps_per_epoch=10, accumulation=2,
        )  # fmt: skip
        batches = itertools.repeat(batch)
        for step in range(2):
            stepper.hand_over(batches, step, Wishes()).numbers()
        waits.clear()
        with Operators() as operators:
            result = stepper.hand_over(batches, 2, Wishes())
        found = {
            "reads": operators.counts["aten::_local_scalar_dense"],
            "synchronisations": len(waits),
            "operators": sum(operators.counts.values()),
            "grad_norm": result.grad_norm,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
