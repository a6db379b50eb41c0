"""The command for the first hour on a GPU runs to its end without one, in small form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runs import REPOSITORY

PARTS = {
    *("machine", "stages", "commands", "synchronisations", "numbers", "attention", "step"),
    *("deterministic", "loader", "upload"),
}


def test_every_part_gives_results(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks/gpu.py", "--small"],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MAE_SCALE_DEVICE": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert not [result for result in results if "error" in result], done.stdout + done.stderr
    assert {result["part"] for result in results} == PARTS
    by_part = {result["part"]: result for result in results}
    assert by_part["stages"]["exit_codes"] == [85, 0, 0] and by_part["stages"]["ok"]
    assert by_part["stages"]["same_losses"]
    rows = [result for result in results if result["part"] == "commands"]
    assert [row["command"] for row in rows] == ["pretrain", "finetune", "reconstruct"]
    assert {row["exit_code"] for row in rows} == {0}
    assert by_part["numbers"]["gradient_fp32"] < 1e-5 < by_part["numbers"]["gradient_bf16"] < 0.1
    assert by_part["deterministic"]["same_bits"]
    assert "_local_scalar_dense" in by_part["synchronisations"]
    assert by_part["loader"]["images_per_second"] > 0
    attention = [result for result in results if result["part"] == "attention"]
    assert [result["tokens"] for result in attention] == [50, 197]
    assert all(any("_scaled_dot_product" in op for op in r["operators"]) for r in attention)
    ours = [result for result in results if result["part"] == "step" and "planned_gb" in result]
    assert ours and all(result["peak_gb"] > 0 for result in ours)
    tables = by_part.keys() - {"machine"}
    assert all(f"\n{part}\n  " in done.stdout for part in tables), done.stdout
