"""In bf16 the fp32 masters, averages and saved frozen weights are the given weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_masters_are_the_given_weights(ranks: int, tmp_path: Path) -> None:
    """At each stage, from random and from loaded weights, whole and with frozen parts; a
    checkpoint holds them, and gives them back as it is and to another stage."""
    worker = Path(__file__).with_name("masters_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, worker, tmp_path],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same bits") == 9 * ranks, done.stdout + done.stderr
