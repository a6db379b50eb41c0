"""Several runs in one process, as in a notebook; each has its process group, watchdog and
signals."""

from __future__ import annotations

import os
import platform
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Run, free_port, in_one_process


@pytest.fixture
def short(run: Run) -> Run:
    run.settings = {"train.max_steps": 4, "train.global_batch_size": 4, "train.epochs": 1000}
    return run


def test_a_stop_of_the_first_run_does_not_stop_the_second(short: Run, tmp_path: Path) -> None:
    """The second run resumes the first under another ZeRO stage, and a third run is undisturbed."""
    endless = replace(short, settings={**short.settings, "train.max_steps": 10_000})
    again = replace(short, settings={**short.settings, "train.max_steps": 40, "deepspeed": "zero3"})
    other = replace(short, run_dir=tmp_path / "other")
    process = in_one_process([(endless, "stop"), (again, ""), (other, "")])
    output, _ = process.communicate(timeout=400)
    assert "exit codes: [85, 0, 0]" in output, output
    assert "stopped by SIGTERM" in output and output.count("finished: ") == 2
    assert [row["step"] for row in again.rows()] == list(range(1, 41))
    assert len(other.rows()) == 4


def test_the_second_run_is_watched_as_the_first_was(short: Run, tmp_path: Path) -> None:
    hanging = replace(
        short,
        run_dir=tmp_path / "hanging",
        settings={**short.settings, "train.max_steps": 10_000, "train.hang_timeout": 10},
    )
    process = in_one_process([(short, ""), (hanging, "hang")])
    output = ""
    assert process.stdout is not None
    for line in process.stdout:  # the suspended worker keeps the pipe open
        output += line
        if "error:" in line:
            break
    for pid in re.findall(r"suspended (\d+)", output):
        os.kill(int(pid), signal.SIGKILL)
    assert process.wait(60) == 1, output
    assert "finished: 4 steps" in output
    assert f"error: rank 0 ({platform.node()}) hangs: waiting for the data of step" in output


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_meet_twice(short: Run, tmp_path: Path, stage: int) -> None:
    short.settings |= {"deepspeed": f"zero{stage}", "train.global_batch_size": 8}
    second = replace(short, run_dir=tmp_path / "second")
    port = str(free_port())
    processes = [
        in_one_process(
            [(short, ""), (second, "")],
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert "exit codes: [0, 0]" in output, output
    assert len(short.rows()) == 4 and short.rows() == second.rows()
