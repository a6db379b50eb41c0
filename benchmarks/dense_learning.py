#!/usr/bin/env python3
"""Check that small detectors and segmenters learn; every model starts from scratch.

segment and detect: shapes pasted on photographs, scored on scenes and photographs that they have
not seen. overfit: a detector on the photographs of a folder in COCO's layout, scored on the same
photographs. Each part goes through all that a user goes through: a folder in the layout of ADE20K
or COCO, `mae-scale shard`, then `mae-scale segment` or `mae-scale detect` with validation.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import header
from shapes import write_ade, write_coco

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.tasks.dense import open_annotated

SIZE = 64  # pixels of a side of the scenes
BATCH = 8  # images of a process in a step
ENCODER = {
    "model.name": "mae_vit_tiny_patch16", "model.drop_path": 0.0, "optim.warmup_steps": 50,
}  # fmt: skip
DETECTOR = {
    **ENCODER, "model.depth": 4, "model.window": 0, "model.pyramid": "fpn", "model.norm": "batch",
    "augment.recipe": "li2021", "optim.schedule": "cosine", "optim.base_lr": 0.032,
}  # fmt: skip
BOTH = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


@dataclass(frozen=True)
class Part:
    """A training: its settings, its length, and the scores that it must reach."""

    command: str
    settings: dict[str, Any]
    steps: int
    """Number of steps, rounded up to whole epochs."""
    scores: dict[str, str]
    goals: dict[str, float]
    """Scores to reach, by name, in percent."""


PARTS = {
    "segment": Part(
        "segment",
        {
            **ENCODER, "model.img_size": SIZE, "model.patch_size": 8, "model.embed_dim": 48,
            "model.depth": 6, "model.channels": 24, "model.auxiliary_channels": 16,
            "model.layer_scale": "null", "augment.colors": "false", "augment.scale": "[0.75, 1.5]",
            "optim.base_lr": 0.032, "optim.layer_decay": 1.0,
        },
        800,
        {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"},
        {"miou": 70.0},
    ),
    "detect": Part(
        "detect",
        {
            **DETECTOR, "model.img_size": SIZE, "model.patch_size": 8, "model.embed_dim": 96,
            "model.channels": 32, "model.hidden": 128, "model.rois": 32, "model.proposals": 100,
            "model.detections": 10, "augment.scale": "[0.75, 1.5]",
        },
        800,
        BOTH,
        {"box_ap": 50.0, "mask_ap": 50.0},
    ),
    "overfit": Part(
        "detect",
        {
            **DETECTOR, "model.img_size": 160, "model.patch_size": 16, "model.embed_dim": 192,
            "model.channels": 32, "model.hidden": 256, "model.rois": 32, "model.proposals": 100,
            "augment.scale": "[1, 1]", "optim.base_lr": 0.048,
        },
        720,
        BOTH,
        {"box_ap50": 50.0, "mask_ap50": 50.0},
    ),
}  # fmt: skip


def learn(name: str, options: argparse.Namespace, root: Path) -> bool:
    """Train, print the scores of each validation, and say whether the goals are reached."""
    part, source, validation = PARTS[name], root / "scenes", root / "val"
    if name == "overfit":
        source, validation = options.coco, root / "train"
    else:
        {"segment": write_ade, "detect": write_coco}[name](source, options.train, options.val, SIZE)
        shard(source, validation, Options("val"), workers=2)
    shard(source, root / "train", Options("train"), workers=2)
    train, val = (
        open_annotated(str(folder), None, part.command) for folder in (root / "train", validation)
    )
    batch = options.processes * max(1, min(BATCH, len(train) // 3 // options.processes))
    epochs = -(-(options.steps or part.steps) // (len(train) // batch))
    keys = {
        "run_dir": root / "run", "data.train": root / "train", "data.val": validation,
        "data.workers": 0, "data.lanes": 8, "train.epochs": epochs,
        "train.global_batch_size": batch, "train.micro_batch_size": batch // options.processes,
        "train.validate_epochs": max(1, epochs // 4), "checkpoint.keep": 1, **part.settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={options.processes}", "-m", "mae_scale", part.command]
    for key, value in keys.items():
        command += [f"--{key}", str(value)]
    start, used = time.monotonic(), processor_seconds()
    # Models so small gain nothing from a second thread.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (root / "log.txt").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit((root / "log.txt").read_text())
    minutes = (time.monotonic() - start) / 60
    cores = (processor_seconds() - used) / 60 / options.processes
    rows = [json.loads(line) for line in (root / "run/validation.jsonl").open()]
    print(f"{name}: {len(train):,} images to train on, batches of {batch}, scored on ", end="")
    print("the same" if name == "overfit" else f"{len(val)} others on other photographs")
    print(f"{'step':>6}" + "".join(f"{label:>11}" for label in part.scores.values()))
    for row in rows:
        print(f"{row['step']:>6}" + "".join(f"{row[key]:>11.2f}" for key in part.scores))
    reached = all(rows[-1][key] >= goal for key, goal in part.goals.items())
    goals = ", ".join(f"{part.scores[key]} {goal:g}" for key, goal in part.goals.items())
    print(
        f"{minutes:.1f} minutes on {options.processes} processes, each of which used "
        f"{cores:.1f} minutes of a core, start and validations included"
    )
    print(f"goal ({goals}): {'reached' if reached else 'NOT reached'}", flush=True)
    return reached


def processor_seconds() -> float:
    """Give the processor time, in seconds, of all programs that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("part", nargs="+", choices=PARTS)
    parser.add_argument("--coco", type=Path, help="folder in COCO's layout, for overfit")
    parser.add_argument("--train", type=int, default=1600, help="scenes to train on")
    parser.add_argument("--val", type=int, default=100, help="scenes to validate on")
    parser.add_argument("--steps", type=int, help="rounded up to whole epochs")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if "overfit" in options.part and options.coco is None:
        parser.error("overfit needs --coco")
    print(header("torchvision", "timm", "deepspeed"), flush=True)
    reached = []
    for part in options.part:
        with tempfile.TemporaryDirectory() as name:
            reached.append(learn(part, options, Path(name)))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
