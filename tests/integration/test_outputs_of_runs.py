"""Outputs that can't be written stop no real run and no save, and change no exit code."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from runs import Run

LONG = {"train.max_steps": 100_000, "train.epochs": 100_000, "checkpoint.every_steps": 50_000}


def is_saved(run: Run) -> None:
    """Check that the run saved the last step of its record."""
    last = run.rows()[-1]["step"]
    folders = [path.parent.name for path in (run.run_dir / "checkpoints").glob("*/COMMITTED.json")]
    assert folders == [f"step-{last:08d}"]
    assert not list((run.run_dir / "checkpoints").rglob("*.py"))  # DeepSpeed's scripts


def wait_for_step(run: Run, process: subprocess.Popen[bytes], step: int) -> None:
    while len(run.rows()) < step:
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_ctrl_c_in_a_pipeline(run: Run, tmp_path: Path, launcher: str) -> None:
    """Ctrl-C during `mae-scale pretrain ... 2>&1 | tee run.log` signals both programs."""
    run.settings = LONG
    run.launcher, run.processes = launcher, 2 if launcher else 1
    command = f"{shlex.join(map(str, run.command()))} 2>&1 | tee '{tmp_path}/run.log'"
    code = tmp_path / "code"
    process = subprocess.Popen(
        # A script that Ctrl-C ends would not tell the exit code; an interactive shell goes on.
        ["bash", "-c", f"trap : INT; {command}; echo ${{PIPESTATUS[0]}} > '{code}'"],
        process_group=0,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    wait_for_step(run, process, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    if not launcher:  # torchrun has exit codes of its own
        assert code.read_text().strip() == "85"
    is_saved(run)


def test_the_terminal_closes(run: Run) -> None:
    """Writes then fail with EIO, and the kernel sends SIGHUP to the foreground processes."""
    run.settings = LONG
    pid, master = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        command = run.command()
        os.execv(command[0], command)
    while len(run.rows()) < 3:
        if select.select([master], [], [], 0.1)[0]:
            os.read(master, 4096)
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 85
    is_saved(run)


def test_tensorboard_and_history_cannot_be_written(run: Run) -> None:
    run.settings = {"train.max_steps": 2}
    run.finish()
    shutil.rmtree(run.run_dir / "tensorboard")
    (run.run_dir / "tensorboard").write_text("a file")
    (run.run_dir / "history.jsonl").unlink()
    (run.run_dir / "history.jsonl").mkdir()
    run.settings = {"train.max_steps": 4}
    output = run.finish()
    assert "tensorboard cannot be written" in output and "history.jsonl cannot be" in output
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
