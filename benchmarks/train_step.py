#!/usr/bin/env python3
"""Measure images/s, MFU and peak memory of a training step, beside the official design.

A step is everything but reading images: uint8 pixels on the device, normalised, masked, forward,
backward, AdamW. Each row runs in a process of its own, on one device.

- official: the design of the authors' code, written for this benchmark: attention as two products
  with a softmax between them, autocast to fp16 with a GradScaler (fp32 on a CPU), AdamW of plain
  tensor operations, the loss read at each step
- mae-scale: DeepSpeed in bf16 or fp32 as `mae-scale pretrain` runs it, at each of `--stages`

MFU counts the operations of the model (recomputing them is none) against the bf16 peak.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from machine import header

from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.data.transforms import normalize
from mae_scale.launch.distributed import World, start
from mae_scale.launch.logs import set_up_logging
from mae_scale.models import MaskedAutoencoderViT, build_mae
from mae_scale.models.compiled import compile_blocks
from mae_scale.models.masking import mask_noise
from mae_scale.planning.flops import count_flops
from mae_scale.planning.gpus import mfu
from mae_scale.tasks.pretrain import trial_loss
from mae_scale.train.deepspeed_config import fill_deepspeed_config, fit_buckets
from mae_scale.train.engine import build_engine
from mae_scale.train.metrics import memory_gb

MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
LEARNING_RATE = 1.5e-4


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    model: str
    official: bool
    precision: str
    checkpointing: str
    compile: bool
    stage: str = "zero1"

    def __str__(self) -> str:
        if self.official:
            return f"official, {self.precision}"
        parts = (
            self.stage,
            self.precision,
            f"checkpointing {self.checkpointing}",
            "compiled" * self.compile,
        )
        return ", ".join(part for part in parts if part)


def official_step(model: MaskedAutoencoderViT, way: Way, device: torch.device) -> Callable:  # type: ignore[type-arg]
    """Make a function that takes a step as the authors' code does."""
    half = way.precision == "fp16"
    for block in [*model.blocks, *model.decoder_blocks]:
        block.attn.fused_attn = False
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=False)
    scaler = torch.amp.GradScaler(device.type, enabled=half)

    def step(images: torch.Tensor) -> None:
        noise = torch.rand(len(images), model.num_patches, device=device)
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss, _, _ = model(normalize(images), noise)
        loss.item()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def our_step(model: MaskedAutoencoderViT, way: Way, batch: int, stage: str = "zero1") -> Callable:  # type: ignore[type-arg]
    """Make a function that takes a step as `mae-scale pretrain` does."""
    train = TrainConfig(global_batch_size=batch, micro_batch_size=batch)
    model.set_activation_checkpointing(way.checkpointing)  # type: ignore[arg-type]
    if way.compile:
        compile_blocks(model)
    config = fill_deepspeed_config(stage, train, World(), way.precision)
    config = fit_buckets(stage, config, model, World())
    engine = build_engine(model, OptimConfig(), config)
    for group in engine.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    zeros = torch.zeros(batch, dtype=torch.int64, device=engine.device)
    samples = torch.arange(batch, device=engine.device)

    def step(images: torch.Tensor) -> None:
        few = slice(len(images))
        noise = mask_noise(0, zeros[few], samples[few], model.num_patches)
        loss, _, _ = engine(normalize(images), noise)
        engine.backward(loss)
        engine.step()

    return step


def measure(
    way: Way, batch: int, rounds: int, steps: int, warm_up: int
) -> tuple[float, float | None, float]:
    """Measure images per second (median of the rounds), MFU, and peak memory in GB."""
    world = World()
    set_up_logging(world)
    device = world.device
    if not way.official:
        start(world)
    torch.manual_seed(0)
    model = build_mae(way.model).to(device)
    with torch.device("meta"):
        flops = count_flops(build_mae(way.model), trial_loss).training
    step = (
        official_step(model, way, device)
        if way.official
        else our_step(model, way, batch, way.stage)
    )
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
    for _ in range(warm_up):
        step(images)
    rates = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(steps):
            step(images)
        synchronize(device)  # not after each step: the host may run ahead, as it does in training
        rates.append(steps * batch / (time.perf_counter() - began))
    rate = statistics.median(rates)
    return rate, mfu(flops, rate, device), memory_gb()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[64] if on_gpu else [2])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"] if on_gpu else ["fp32"])
    parser.add_argument("--stages", nargs="+", default=["zero1"], help="configs in ds_configs/")
    parser.add_argument("--checkpointing", nargs="+", default=["none", "full"])
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 1, help="of a round")
    parser.add_argument("--warm-up", type=int, default=5 if on_gpu else 1, help="not timed")
    args = parser.parse_args()
    print(header("timm", "deepspeed"))
    print(
        f"{args.rounds} rounds of {args.steps} steps after {args.warm_up}\n"
        f"{'model':24}{'batch':>6}  {'':46}{'img/s':>9}{'MFU':>7}{'peak GB':>9}{'x official':>12}"
    )
    processes = multiprocessing.get_context("spawn")
    for name, batch in itertools.product(args.models, args.batch):
        ways = [Way(name, True, "fp16" if on_gpu else "fp32", "none", False)]
        for stage, precision, checkpointing, compiled in itertools.product(
            args.stages, args.precision, args.checkpointing, args.compile
        ):
            ways.append(Way(name, False, precision, checkpointing, compiled == "yes", stage))
        official = float("nan")
        for way in ways:
            # Each row has a process of its own, so that its memory is freed before the next one.
            with ProcessPoolExecutor(1, processes) as pool:
                job = pool.submit(measure, way, batch, args.rounds, args.steps, args.warm_up)
                try:
                    result = job.result()
                except torch.OutOfMemoryError:
                    print(f"{name:24}{batch:6}  {way!s:46}  out of memory", flush=True)
                    continue
            rate, share, memory = result
            official = rate if way.official else official
            mfu_text = "-" if share is None else f"{share:.3f}"
            print(
                f"{name:24}{batch:6}  {way!s:46}{rate:9.2f}{mfu_text:>7}{memory:9.2f}"
                f"{rate / official:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
