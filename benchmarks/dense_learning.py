#!/usr/bin/env python3
"""Whether a small segmenter learns: mIoU on shapes that it has not seen, on an unseen photograph.

It goes through all that a user goes through: a folder in ADE20K's layout, `mae-scale shard`,
`mae-scale segment` with its validation. The model is small and starts from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import header
from shapes import write_ade

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard

SIZE = 64  # pixels of a side of the scenes
MODEL = {
    "name": "mae_vit_tiny_patch16", "img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 6,
    "channels": 24, "auxiliary_channels": 16, "drop_path": 0.0, "layer_scale": "null",
}  # fmt: skip
OPTIM = {"base_lr": 0.05, "warmup_steps": 50, "layer_decay": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--train", type=int, default=1600, help="scenes to train on")
    parser.add_argument("--val", type=int, default=60, help="scenes to validate on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--goal", type=float, default=70.0, help="mIoU that must be reached")
    args = parser.parse_args()
    print(header("torchvision", "timm", "deepspeed"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_ade(root / "scenes", args.train, args.val, SIZE)
        for split in ("train", "val"):
            shard(root / "scenes", root / split, Options(split), workers=2)
        keys = {"run_dir": root / "run", "data.train": root / "train", "data.val": root / "val",
                "data.workers": 1, "train.epochs": args.epochs, "train.global_batch_size": 8,
                "train.micro_batch_size": 8, "train.validate_epochs": 2}  # fmt: skip
        keys |= {f"model.{key}": value for key, value in MODEL.items()}
        keys |= {f"optim.{key}": value for key, value in OPTIM.items()}
        command = [sys.executable, "-m", "mae_scale", "segment"]
        start = time.monotonic()
        for key, value in keys.items():
            command += [f"--{key}", str(value)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # A model so small gains nothing from a second thread.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, **quiet)
        seconds = time.monotonic() - start
        rows = [json.loads(line) for line in (root / "run/validation.jsonl").open()]
    print(f"{args.train} scenes to train on, {args.val} others on another photograph")
    print(f"{'step':>6}{'mIoU':>8}{'mAcc':>8}{'aAcc':>8}")
    for row in rows:
        print(f"{row['step']:>6}{row['miou']:>8.2f}{row['macc']:>8.2f}{row['aacc']:>8.2f}")
    print(f"{seconds / 60:.1f} minutes, validations included")
    reached = rows[-1]["miou"] >= args.goal
    print(f"goal of {args.goal:g}: {'reached' if reached else 'NOT reached'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
