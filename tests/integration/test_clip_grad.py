"""`optim.clip_grad` does at every ZeRO stage what `clip_grad_norm_` of PyTorch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = [f"zero{stage},fp32" for stage in range(4)] + ["zero3_offload,fp32", "zero0,bf16"]


def test_clipped_steps_are_those_of_pytorch() -> None:
    """Clipped steps of two ranks equal PyTorch's; the norms are those of the mean over both
    ranks."""
    worker = Path(__file__).with_name("clip_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, worker, *CASES],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is clipped") == len(CASES), done.stdout + done.stderr
