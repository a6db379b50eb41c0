"""A run whose folder or checkpoints somebody changes loses nothing, and says what is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from runs import Run


def test_a_run_without_its_checkpoints_is_refused_and_starts_over_when_told(run: Run) -> None:
    run.settings = {"checkpoint.every_steps": 2, "train.max_steps": 4}
    run.finish()
    rows = run.rows()
    record = (run.run_dir / "metrics.jsonl").read_bytes()
    for state in run.run_dir.glob("checkpoints/*/*.pt"):
        state.write_bytes(state.read_bytes()[:-1])
    output = run.finish(2)
    assert "step-00000004: " in output and "step-00000002: " in output
    shutil.move(run.run_dir / "checkpoints", run.run_dir.with_name("elsewhere"))
    output = run.finish(2)
    assert "no checkpoint in it can be used" in output and "--start_over true" in output
    assert (run.run_dir / "metrics.jsonl").read_bytes() == record
    run.settings |= {"start_over": "true"}
    run.finish()
    assert run.rows() == rows
    (aside,) = run.run_dir.glob("before-*")
    assert (aside / "metrics.jsonl").read_bytes() == record
    assert "is finished" in run.finish()  # it does not start over again


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_is_renamed_ends_the_run(run: Run, tmp_path: Path, processes: int) -> None:
    run.settings = {"train.epochs": 10_000, "checkpoint.every_steps": 2}
    if processes > 1:
        run.launcher, run.processes = "torchrun", processes

    def rename(process: subprocess.Popen[str]) -> None:
        run.run_dir.rename(tmp_path / "renamed")

    output = run.stop(5, rename, 1)
    assert "is no longer the folder that this run began in" in output
    assert not run.run_dir.exists()
    run.run_dir = tmp_path / "renamed"
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1))
