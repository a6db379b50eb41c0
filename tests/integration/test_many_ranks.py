"""The first and the last of 512 ranks build, step and give their state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_ranks_0_and_511_of_512() -> None:
    """ZeRO 1 to 3 work with layer-wise decay, where most groups have fewer values than ranks."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("many_ranks_worker.py")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"stage {n} works" in done.stdout for n in (1, 2, 3)] == [True] * 3, done.stdout
