#!/usr/bin/env python3
"""Train ViT-H some real steps under ZeRO-3 with the optimiser in host memory, on CPU processes.

The real command on real photographs, watched from outside: the largest resident memory of each
rank, and the loss of each step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from machine import header

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.train.records import read_metrics


def peak_memory(ranks: list[psutil.Process], peaks: dict[str, int]) -> None:
    """Update the largest resident bytes of each rank, as the kernel has counted them."""
    for process in ranks:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            rank = process.environ()["RANK"]
        except (OSError, psutil.Error, KeyError):
            continue
        if "VmHWM" in status:
            kilobytes = int(status.split("VmHWM:")[1].split()[0])
            peaks[rank] = max(peaks.get(rank, 0), kilobytes * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of class folders of photographs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--deepspeed", default="zero3_offload")
    parser.add_argument("--scratch", type=Path, help="folder with room for a checkpoint, 10 GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        shards, run_dir = Path(scratch) / "shards", Path(scratch) / "run"
        assert shard(args.images, shards, Options("train", resize_short=256), workers=1) == 0
        settings = {
            "run_dir": run_dir,
            "data.train": shards,
            "data.workers": 0,
            "deepspeed": args.deepspeed,
            "train.global_batch_size": args.processes,
            "train.micro_batch_size": 1,
            "train.max_steps": args.steps,
            "train.log_every": 1,
            "train.activation_checkpointing": "full",
            "optim.warmup_epochs": 0,
            "checkpoint.every_minutes": "null",
        }
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(args.processes), "-m", "mae_scale", "pretrain"),
            *("--config", "pretrain_vit_huge"),
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
        began = time.monotonic()
        # glibc otherwise keeps much of what was freed, a gigabyte for each rank.
        launcher = subprocess.Popen(
            command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        )
        family = psutil.Process(launcher.pid)
        peaks: dict[str, int] = {}
        while launcher.poll() is None:
            peak_memory(family.children(), peaks)
            time.sleep(0.2)
        seconds = time.monotonic() - began
        rows = read_metrics(run_dir / "metrics.jsonl")
        checkpoint = sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file())
    print(header("deepspeed"))
    print(
        f"mae_vit_huge_patch14, {args.deepspeed}, {args.processes} processes, exit code "
        f"{launcher.returncode}, {seconds:.0f} s with the save of {checkpoint / 1e9:.1f} GB"
    )
    for row in rows:
        print(f"step {row['step']}: loss {row['loss']:.5f}, gradient norm {row['grad_norm']:.4f}, "
              f"{row['images_per_second']:.3f} images/s")  # fmt: skip
    for rank, peak in sorted(peaks.items()):
        print(f"rank {rank}: peak resident memory {peak / 1e9:.2f} GB")
    print(f"all ranks: {sum(peaks.values()) / 1e9:.2f} GB (shared libraries counted for each)")


if __name__ == "__main__":
    main()
