#!/usr/bin/env python3
"""Measure the peak memory of `mae-scale export`, beside the sizes of weights and checkpoint.

The real command makes one step under ZeRO-3 on two processes, on real photographs, and saves. Then
each form is exported in a process of its own. Memory is the kernel's VmHWM, which counts pages of
mapped files, less that of a process that has only imported what export needs. They are compared
with DeepSpeed's own `get_fp32_state_dict_from_zero_checkpoint`, and with `torch.save`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import header

from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard

PEAK = """
from pathlib import Path
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
"""
IMPORTS = "import sys; import timm; from mae_scale.tasks import export"
EXPORT = "export.main(sys.argv[1:], 'mae-scale export')"
DEEPSPEED = """
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
state = get_fp32_state_dict_from_zero_checkpoint(sys.argv[1], tag=sys.argv[2])
torch.save({"model": state}, sys.argv[3])
"""


def peak(code: str, *arguments: str | Path) -> int:
    """Measure the largest resident memory, in bytes, of a process that runs these lines."""
    command = [sys.executable, "-c", f"{IMPORTS}\n{code}{PEAK}", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of class folders of photographs")
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--deepspeed", default="zero3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder with room for checkpoint and exports")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        shards, run_dir = Path(scratch) / "shards", Path(scratch) / "run"
        assert shard(args.images, shards, Options("train", resize_short=256), workers=1) == 0
        settings = {
            "run_dir": run_dir,
            "data.train": shards,
            "data.workers": 0,
            "model.name": args.model,
            "deepspeed": args.deepspeed,
            "train.precision": "fp32",
            "train.global_batch_size": args.processes,
            "train.micro_batch_size": 1,
            "train.max_steps": 1,
        }
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(args.processes), "-m", "mae_scale", "pretrain"),
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
        subprocess.run(command, check=True)
        folder = run_dir / "checkpoints" / "step-00000001"
        idle = peak("")
        peaks, official = {}, Path(scratch) / "official.pth"
        if args.deepspeed.startswith("zero3"):
            out = Path(scratch) / "deepspeed.pth"
            peaks["DeepSpeed's function"] = peak(DEEPSPEED, folder.parent, folder.name, out)
        for to, out in (
            ("official", official),
            ("timm", Path(scratch) / "timm.safetensors"),
            ("huggingface", Path(scratch) / "huggingface"),
        ):
            peaks[f"export --to {to}"] = peak(EXPORT, run_dir, "--to", to, out)
        checkpoint = size(folder)
        weights = official.stat().st_size
    print(header("deepspeed", "safetensors"))
    print(
        f"{args.model}, {args.deepspeed}, {args.processes} processes: weights {weights / 1e6:,.0f} "
        f"MB, checkpoint {checkpoint / 1e6:,.0f} MB; imports take {idle / 1e6:,.0f} MB"
    )
    print(f"{'':24}{'peak - imports, MB':>20}{'x weights':>12}{'x checkpoint':>14}")
    for name, found in peaks.items():
        extra = found - idle
        print(f"{name:24}{extra / 1e6:20,.0f}{extra / weights:12.2f}{extra / checkpoint:14.2f}")


if __name__ == "__main__":
    main()
