"""At ZeRO 0 to 2 the host reads nothing from the device within a step, and never waits for it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path


def test_waits_and_reads_of_a_step() -> None:
    """Pre-training, probing, and fine-tuning with layer-wise decay, clipping and an average are
    counted."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("host_waits_worker.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"task"')]
    assert len(found) == 7
    for case in found:
        assert case["reads"] == 0, case
        assert case["waits"] == {}, case
        assert math.isfinite(case["grad_norm"]) and case["grad_norm"] > 0, case
