"""Steps that are not finite are not applied, are counted, end the run, and can be replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from runs import Run

CASES = [
    (name, precision, accumulation)
    for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
    if (name, precision) != ("zero3_offload", "bf16") or accumulation == 1
]


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    """Only one of two ranks sees the NaN, and neither applies the step."""
    worker = Path(__file__).with_name("guard_worker.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    cases = [f"{name},{precision},{accumulation}" for name, precision, accumulation in CASES]
    done = subprocess.run(
        [sys.executable, *launch, worker, *cases],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is guarded") == len(CASES), done.stdout + done.stderr


def test_too_many_bad_steps_end_the_run_and_a_replay_shows_the_place(run: Run) -> None:
    settings = {"optim.base_lr": 1e30, "train.max_bad_steps": 3, "checkpoint.every_steps": 1}
    run = replace(run, launcher="torchrun", processes=2, settings=settings)
    output = run.finish(1)
    assert "steps in a row could not be applied" in output
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").open()]
    first = next(row["step"] for row in rows if row["loss"] is None or row["grad_norm"] is None)
    assert f"the first is step {first}" in output and f"--replay {first}" in output
    saved = sorted(p.name for p in (run.run_dir / "checkpoints").glob("step-*/COMMITTED.json"))
    before = sorted(p for p in run.run_dir.rglob("*") if p.is_file())
    run.settings["replay"] = first
    output = run.finish()
    assert f"step {first}: loss " in output
    assert "the first value that is not finite is the output of" in output
    assert sorted(p for p in run.run_dir.rglob("*") if p.is_file()) == before and saved
