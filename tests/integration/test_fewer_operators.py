"""Fewer operators change no bit of weights, moments and gradient norms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_those_of_deepspeeds_own_steps(ranks: int) -> None:
    """With accumulation, layer-wise decay and several kinds of buckets, at ZeRO 1 and 2."""
    worker = Path(__file__).with_name("fewer_operators_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, worker],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same bits") == 6 * ranks, done.stdout + done.stderr
