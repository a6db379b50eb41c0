#!/usr/bin/env python3
"""Compare a bf16 and an fp32 residual stream over 2,000 steps of a small MAE.

Three runs of the real command on the same shards with the same seed, so that each step sees the
same photographs, crops and masks:

- fp32: everything is fp32
- autocast: `train.autocast`, as the authors compute: weights and the residual stream are fp32,
  layers are computed in bf16
- bf16: the default on GPUs: weights and the residual stream are bf16, master weights fp32

It prints the mean loss over stretches of steps, its relative difference to fp32's, and the same
for a second fp32 run with another seed, which shows how much of the difference is chance.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import header

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.train.records import read_metrics

BATCH = 16
SETTINGS = {
    "model.name": "mae_vit_tiny_patch16",
    "model.embed_dim": 48,
    "model.decoder_embed_dim": 48,
    "model.depth": 12,
    "model.img_size": 32,
    "model.patch_size": 8,
    "model.decoder_depth": 1,
    "data.workers": 0,
    "data.lanes": 8,
    "train.global_batch_size": BATCH,
    "train.micro_batch_size": BATCH,
    "train.log_every": 1,
    "train.reconstruct_every": "null",
    "optim.base_lr": 6e-3,
    "checkpoint.every_minutes": "null",
}
WAYS: dict[str, dict[str, object]] = {
    "fp32": {"train.precision": "fp32"},
    "autocast": {"train.precision": "bf16", "train.autocast": True},
    "bf16": {"train.precision": "bf16"},
    "fp32, another seed": {"train.precision": "fp32", "seed": 1},
}


def losses(run_dir: Path, shards: Path, settings: dict[str, object]) -> np.ndarray:
    """Read the loss of each step of a run."""
    settings = {**SETTINGS, "run_dir": run_dir, "data.train": shards, **settings}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run(
        [sys.executable, "-m", "mae_scale", "pretrain", *arguments], check=True,
        stdout=sys.stderr,
    )  # fmt: skip
    return np.array([row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of class folders of photographs")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        assert shard(args.images, folder / "shards", Options("train", resize_short=64)) == 0
        images = json.loads((folder / "shards" / "manifest.json").read_text())["num_samples"]
        per_epoch = images // BATCH
        # The learning rate warms up within a tenth of the steps, and falls until the last of them.
        limit = {
            "train.max_steps": args.steps,
            "train.epochs": math.ceil(args.steps / per_epoch),
            "optim.warmup_epochs": 0.1 * args.steps / per_epoch,
        }
        curves = {
            way: losses(folder / way.replace(", ", "_").replace(" ", "_"), folder / "shards",
                        {**limit, **settings})
            for way, settings in WAYS.items()
        }  # fmt: skip
    print(header("deepspeed"))
    stretches = np.array_split(np.arange(args.steps), 5)
    ends = "".join(f"{f'to {stretch[-1] + 1}':>18}" for stretch in stretches)
    print(f"{'mean loss, steps':20}{ends}")
    for way, curve in curves.items():
        means = [curve[stretch].mean() for stretch in stretches]
        base = [curves["fp32"][stretch].mean() for stretch in stretches]
        cells = [f"{a:.4f} ({a / b - 1:+.2%})" for a, b in zip(means, base, strict=True)]
        print(f"{way:20}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
