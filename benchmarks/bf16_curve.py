#!/usr/bin/env python3
"""Compare the losses of bf16 and fp32 over 300 steps of a small MAE on real photographs.

Both runs are the real command on the same shards with the same seed: the same photographs, crops
and masks at each step. bf16 means bf16 weights and activations with fp32 master weights, loss,
targets and sums of gradients. The loss curves are smoothed over `SMOOTH` steps and compared.

On a CPU without bf16 matrix units the bf16 run is several times slower; the numbers mean the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import header
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.train.records import read_metrics

STEPS = 300
SMOOTH = 20  # steps of the moving mean
# Largest relative difference of the smoothed curves. The authors' arithmetic, autocast to bf16 with
# fp32 weights, stays within 0.1 % of fp32 over 20 steps; over hundreds of steps the paths part.
TOLERANCE = 0.01

SETTINGS = {
    "model.name": "mae_vit_tiny_patch16",
    "model.depth": 6,
    "model.img_size": 48,
    "model.patch_size": 8,
    "model.decoder_depth": 2,
    "data.workers": 1,
    "data.lanes": 8,
    "train.epochs": 50,
    "train.max_steps": STEPS,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 16,
    "train.log_every": 1,
    "optim.base_lr": 6e-3,  # peak 7.5e-4
    "optim.warmup_epochs": 5,
    "checkpoint.every_minutes": "null",
    "deepspeed": "zero2",
}


def losses(run_dir: Path, shards: Path, precision: str) -> np.ndarray:
    """Read the loss of each step of a run."""
    settings = {**SETTINGS, "run_dir": run_dir, "data.train": shards, "train.precision": precision}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "mae_scale", "pretrain", *arguments], check=True)
    return np.array([row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")])


def smooth(values: np.ndarray) -> np.ndarray:
    """Give the moving mean over `SMOOTH` steps, [STEPS - SMOOTH + 1]."""
    return np.convolve(values, np.full(SMOOTH, 1 / SMOOTH), mode="valid")


def draw(path: Path, curves: dict[str, np.ndarray], difference: np.ndarray) -> None:
    """Draw both curves above, and their relative difference below."""
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
        (line,) = above.plot(range(1, STEPS + 1), values, linewidth=0.6, alpha=0.35)
        above.plot(range(SMOOTH, STEPS + 1), smooth(values), style, color=line.get_color(),
                   linewidth=1.6, label=f"{name}, mean of {SMOOTH} steps")  # fmt: skip
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.plot(range(SMOOTH, STEPS + 1), 100 * difference, color="#444444", linewidth=1)
    below.axhline(0, color="#999999", linewidth=0.6)
    for sign in (-1, 1):
        below.axhline(sign * 100 * TOLERANCE, color="#b3261e", linewidth=0.8, linestyle=":")
    below.set_ylabel("difference, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of class folders of photographs")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        assert shard(args.images, shards, Options("train", resize_short=96), workers=2) == 0
        curves = {p: losses(Path(scratch) / p, shards, p) for p in ("fp32", "bf16")}
    fp32, bf16 = (smooth(values) for values in curves.values())
    difference = bf16 / fp32 - 1
    if args.figure:
        draw(args.figure, curves, difference)
    largest, mean = np.abs(difference).max(), np.abs(difference).mean()
    print(header("deepspeed"))
    print(f"{STEPS} steps, loss {fp32[0]:.4f} -> {fp32[-1]:.4f} in fp32, "
          f"{bf16[0]:.4f} -> {bf16[-1]:.4f} in bf16 (means of {SMOOTH} steps)")  # fmt: skip
    verdict = "within" if largest <= TOLERANCE else "NOT within"
    print(f"relative difference of the smoothed curves: largest {largest:.2%}, mean {mean:.2%}; "
          f"tolerance {TOLERANCE:.0%}: {verdict}")  # fmt: skip
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
