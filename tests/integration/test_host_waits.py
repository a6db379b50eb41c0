"""The host never waits for the device within a step, but once under ZeRO-3."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("config", "reads"), [("zero0", 0), ("zero1", 0), ("zero2", 0), ("zero3", 1)]
)
def test_reads_and_synchronisations_of_a_step(config: str, reads: int) -> None:
    """With layer-wise decay, two micro-batches, clipping and a moving average, in bf16."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("host_waits_worker.py"), config, "bf16"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reads"] == reads and found["synchronisations"] == 0
    assert math.isfinite(found["grad_norm"]) and found["grad_norm"] > 0
