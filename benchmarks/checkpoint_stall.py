#!/usr/bin/env python3
"""Measure how long a save stalls training, beside DeepSpeed's save, which neither syncs nor hashes.

One process trains a model on random pixels under ZeRO-1 and saves in turns: DeepSpeed's own
`save_checkpoint`; ours in the foreground; ours in the background. There the stall is the copy of
the state to host memory; the rest of the loss is that steps are slower while the thread writes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import header

from mae_scale.config.batch import resolve_precision
from mae_scale.config.sections import CheckpointConfig, OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.models import build_mae
from mae_scale.train.checkpoint import Commit, Saver
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.ds import TorchCheckpointEngine
from mae_scale.train.engine import build_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--micro-batch", type=int, default=2, help="images of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    args = parser.parse_args()
    world = World()
    with process_group(world, 600), tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        measure(args, world, Path(scratch))


def measure(args: argparse.Namespace, world: World, scratch: Path) -> None:
    torch.manual_seed(0)
    model = build_mae(args.model)
    train = TrainConfig(global_batch_size=args.micro_batch, micro_batch_size=args.micro_batch)
    precision = resolve_precision("auto", world.device)
    engine = build_engine(
        model, OptimConfig(), fill_deepspeed_config("zero1", train, world, precision)
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = torch.rand(args.micro_batch, 3, 224, 224, device=world.device, dtype=dtype)
    noise = torch.rand(args.micro_batch, model.num_patches, device=world.device)

    def step() -> float:
        began = time.perf_counter()
        loss, _, _ = engine(images, noise)
        engine.backward(loss)
        engine.step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    quiet = [step() for _ in range(6)][2:]
    stall: dict[str, list[float]] = {"DeepSpeed's save": [], "foreground": [], "background": []}
    whole: dict[str, list[float]] = {name: [] for name in stall}
    lost: list[float] = []
    number = 0
    for _ in range(args.rounds):
        engine.checkpoint_engine = TorchCheckpointEngine()
        began = time.perf_counter()
        engine.save_checkpoint(str(scratch / "plain"), tag="plain", save_latest=False)
        stall["DeepSpeed's save"].append(time.perf_counter() - began)
        whole["DeepSpeed's save"].append(time.perf_counter() - began)
        bytes_saved = sum(path.stat().st_size for path in (scratch / "plain" / "plain").iterdir())
        shutil.rmtree(scratch / "plain")
        os.sync()
        for name in ("foreground", "background"):
            number += 1
            least = 0.0 if name == "background" else None
            config = CheckpointConfig(keep=1, background_gb=least)
            saver = Saver(engine, scratch / "run", world, config)
            commit = Commit(number, number, 1, 1, precision, "", "", False, 0, {})
            began = time.perf_counter()
            saver.start(commit)
            stall[name].append(time.perf_counter() - began)
            slow = []
            while name == "background" and not saver.written:
                slow.append(step())
            finish = time.perf_counter()
            saver.finish()
            stall[name][-1] += time.perf_counter() - finish
            whole[name].append(time.perf_counter() - began)
            if name == "background":
                lost.append(sum(slow) - len(slow) * statistics.median(quiet))
            os.sync()

    print(header("deepspeed"))
    print(
        f"{args.model}, {precision}, {bytes_saved / 1e9:.2f} GB a save, a step of "
        f"{args.micro_batch} images takes {statistics.median(quiet):.2f} s; medians of "
        f"{args.rounds} rounds"
    )
    print(
        f"{'':20}{'stall, s':>10}{'x DeepSpeed':>13}{'slower steps, s':>17}{'on disk after, s':>18}"
    )
    plain = statistics.median(stall["DeepSpeed's save"])
    for name, times in stall.items():
        slower = f"{statistics.median(lost):17.2f}" if name == "background" else f"{'-':>17}"
        print(
            f"{name:20}{statistics.median(times):10.2f}{statistics.median(times) / plain:13.2f}"
            f"{slower}{statistics.median(whole[name]):18.2f}"
        )


if __name__ == "__main__":
    main()
