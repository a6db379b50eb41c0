"""`optim.clip_grad` at every ZeRO stage is `clip_grad_norm_` of PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = [f"zero{stage},fp32" for stage in range(4)] + ["zero3_offload,fp32", "zero0,bf16"]


def test_clipped_steps_are_those_of_pytorch() -> None:
    """On two ranks, whose norms are those of the mean over both."""
    worker = Path(__file__).with_name("clip_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, worker, *CASES],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is clipped") == len(CASES), done.stdout + done.stderr
