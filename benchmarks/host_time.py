#!/usr/bin/env python3
"""Measure host time, operators and reads by the host in a training step, beside plain PyTorch.

The model has ViT-L's depth (24 blocks and 8) and a width of 16, so that arithmetic costs nothing
and what remains is what the host does for each step: Python, dispatch, hooks, hand-written loops.
On a GPU this is the time in which it must be done with a step, or the GPU waits for it.

- plain: DistributedDataParallel, autocast to bf16, fused AdamW with the same groups of parameters
- zero0 to zero3: `Stepper.hand_over`, the step of every task of `mae-scale`, in bf16; at zero3 the
  optimiser's step is DeepSpeed's own

Pre-training has 2 groups of parameters. Fine-tuning with layer-wise decay has two for each layer,
and its model has no decoder.

All of them run in one process without a GPU and take turns, round after round; a
round's host time is the shortest of its steps, and a ratio is the median of the ratios within the
rounds. An operator that only gives a view is no kernel. A read is `_local_scalar_dense`: on a GPU
the host would wait for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine import header
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mae_scale.config.classification import FinetuneOptimConfig
from mae_scale.config.sections import OptimConfig, OptimizerConfig, TrainConfig
from mae_scale.data.transforms import normalize
from mae_scale.launch.distributed import process_group
from mae_scale.launch.stopping import StopRequest
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models import build_classifier, build_mae
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.ds import restore_linear
from mae_scale.train.engine import build_engine
from mae_scale.train.optimizers import optimizer_groups
from mae_scale.train.step import Batch, Stepper, Wishes
from mae_scale.world import World

STAGES = ("zero0", "zero1", "zero2", "zero3")
AIMS = {"plain": 1.0, "zero0": 1.3, "zero1": 1.3, "zero2": 1.3}
NAME = "mae_vit_large_patch16"
BATCH = 2
Step = Callable[[], object]


class Operators(TorchDispatchMode):
    """Counter of operators by their qualified names, and of those that return no view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        self.counts[name] += 1
        if not func.is_view and name not in NO_KERNELS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


# Operators that are no views by their schema, but no work for a device either.
NO_KERNELS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view",
              "aten::new_empty", "aten::new_empty_strided", "aten::set_", "aten::_reshape_alias",
              "profiler::_record_function_enter_new", "profiler::_record_function_exit",
              "aten::detach_", "aten::lift_fresh"}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task of `mae-scale` on a model that is so narrow that only the number of operators takes
    time."""

    make: Callable[[], nn.Module]
    optim: OptimizerConfig
    loss: Callable[[nn.Module, nn.Module, Batch], torch.Tensor]
    """Loss of a batch; takes the model, the same model or engine around it, and the batch."""


def tasks(depth: int, decoder_depth: int) -> dict[str, Task]:
    """Make pre-training and fine-tuning with layer-wise decay, at these depths."""
    narrow = {"img_size": 32, "embed_dim": 16, "num_heads": 1, "depth": depth}
    decoder = {"decoder_embed_dim": 16, "decoder_num_heads": 1, "decoder_depth": decoder_depth}

    def reconstruct(model: Any, call: nn.Module, batch: Batch) -> torch.Tensor:
        noise = model.noise(0, batch["epoch"], batch["sample"])
        return call(normalize(batch["image"]), noise)[0]

    def classify(model: Any, call: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(call(normalize(batch["image"])).float(), batch["sample"])

    return {
        "pretrain": Task(lambda: build_mae(NAME, **narrow, **decoder), OptimConfig(), reconstruct),
        "finetune": Task(
            lambda: build_classifier(NAME, num_classes=10, **narrow, drop_path=0.2),
            FinetuneOptimConfig(layer_decay=0.75), classify,
        ),
    }  # fmt: skip


def a_batch() -> Batch:
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    return {"image": images, "sample": torch.arange(BATCH), "epoch": torch.zeros(BATCH).long()}


def plain_step(task: Task, batch: Batch) -> Step:
    """Make a function that takes a step of PyTorch alone."""
    model = task.make()
    groups = optimizer_groups(model, task.optim)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    wrapped = DistributedDataParallel(model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(model, wrapped, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(stage: str, task: Task, batch: Batch, world: World, watchdog: Watchdog) -> Step:
    """Make a function that takes a step of `mae-scale` and reads its numbers one step late."""
    train = TrainConfig(global_batch_size=BATCH, micro_batch_size=BATCH)
    model = task.make()
    engine = build_engine(model, task.optim, fill_deepspeed_config(stage, train, world, "bf16"))
    stepper = Stepper(
        engine=engine, loss_of=lambda engine, batch, *_: task.loss(model, engine, batch),
        world=world, watchdog=watchdog, stop=StopRequest(), seed=0, train=train, optim=task.optim,
        steps_per_epoch=10, accumulation=1,
    )  # fmt: skip
    batches, steps = itertools.repeat(batch), itertools.count()
    return lambda: stepper.hand_over(batches, next(steps), Wishes())


def with_linear(step: Step) -> Step:
    """Let a step keep the linear layers of this moment; DeepSpeed replaces them at ZeRO 3."""
    linear = F.linear

    def run() -> None:
        F.linear = linear
        step()

    return run


def shortest(step: Step, steps: int) -> float:
    """Give the CPU time of the shortest of some steps, in ms: other processes do not count."""
    times = []
    for _ in range(steps):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return 1e3 * min(times)


def table(task: Task, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Make a row for each setting: host_ms, ratio, operators, kernels, reads, and the counts by
    name."""
    torch.manual_seed(0)
    batch, world = a_batch(), World()
    with process_group(world, 600) as watchdog:
        ways = {"plain": with_linear(plain_step(task, batch))}
        for stage in STAGES:  # ZeRO 3 is the last
            ways[stage] = with_linear(our_step(stage, task, batch, world, watchdog))
        restore_linear()
        for step in ways.values():
            shortest(step, 3)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, step in ways.items():
                times[way].append(shortest(step, steps))
        rows = []
        for way, step in ways.items():
            with Operators() as operators:
                step()
            ratios = [own / plain for own, plain in zip(times[way], times["plain"], strict=True)]
            rows.append({
                "way": way, "host_ms": statistics.median(times[way]),
                "ratio": statistics.median(ratios), "operators": operators.counts.total(),
                "kernels": operators.kernels.total(),
                "reads": operators.counts["aten::_local_scalar_dense"],
                "by_name": operators.kernels,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=tasks(0, 0), default=[*tasks(0, 0)])
    parser.add_argument("--depth", type=int, nargs=2, default=(24, 8), help="encoder, decoder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the shortest counts")
    parser.add_argument("--names", type=int, default=0, help="so many kernels of each way by name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MAE_SCALE_DEVICE"] = "cpu"
    print(header("deepspeed"))
    print(f"{args.depth[0]} + {args.depth[1]} blocks; {args.rounds} rounds of {args.steps} steps")
    for name in args.tasks:
        task = tasks(*args.depth)[name]
        show(name, len(optimizer_groups(task.make(), task.optim)),
             table(task, args.rounds, args.steps), args.names)  # fmt: skip


def show(name: str, groups: int, rows: list[dict[str, Any]], names: int) -> None:
    """Print the table of a task."""
    print(f"\n{name}, {groups} groups of parameters")
    print(f"{'':8}{'host ms':>9}{'x plain':>9}{'aim':>6}{'operators':>11}{'kernels':>9}"
          f"{'x plain':>9}{'reads':>7}")  # fmt: skip
    for row in rows:
        share = row["kernels"] / rows[0]["kernels"]
        print(f"{row['way']:8}{row['host_ms']:9.1f}{row['ratio']:9.2f}"
              f"{AIMS.get(row['way'], '-'):>6}{row['operators']:11,}{row['kernels']:9,}"
              f"{share:9.2f}{row['reads']:7}", flush=True)  # fmt: skip
    for row in rows if names else ():
        counts = row["by_name"].most_common(names)
        print(f"{row['way']}: " + ", ".join(f"{kernel} {count}" for kernel, count in counts))


if __name__ == "__main__":
    main()
