"""Each part of a classifier can be trained at each ZeRO stage, with the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_part_trains_at_each_stage(ranks: int) -> None:
    """The head, half a block, one block, two, and all, also with recomputing."""
    worker = Path(__file__).with_name("tuning_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, worker],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 10
    for case in found:
        first, *others = case["losses"]
        assert first[-1] < first[0], case
        for losses in others:
            assert losses == pytest.approx(first, rel=1e-5), case
