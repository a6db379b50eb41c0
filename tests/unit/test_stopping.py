"""Ctrl-C gets an answer at once: during start-up, in a step, in a save, and in the data tools."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mae_scale.launch.stopping import StopRequest

REPOSITORY = Path(__file__).parents[2]
STARTING = """
import os, signal, time
from mae_scale.launch.stopping import catch_signals_early, catching_signals
catch_signals_early()
os.kill(os.getpid(), signal.SIGINT)
with catching_signals() as stop:
    print(stop.reason)
"""


def starting(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    return subprocess.run(
        [sys.executable, "-c", STARTING],
        env={**environment, **variables}, capture_output=True, text=True,
    )  # fmt: skip


def test_before_the_run_a_process_alone_ends_at_once() -> None:
    done = starting()
    assert (done.returncode, done.stdout) == (85, "")
    assert done.stderr == "mae-scale: stopped before the run began; the same command starts it\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_of_several_remembers_and_rank_0_answers(rank: str, lines: int) -> None:
    done = starting(RANK=rank)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n")
    assert done.stderr.count("mae-scale: stopping once all processes are there") == lines


@pytest.mark.parametrize(
    ("doing", "first"),
    [
        ("computing step 7", "stopping after this step; press again to see how long"),
        ("waiting for the data of step 7", "stopping after this step; press"),
        ("building the engine", "stopping after building the engine; press"),
        ("saving step 6", "stopping after saving step 6; press"),
    ],
)
def test_answers_of_a_run(doing: str, first: str, capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    stop.doing, stop.step_seconds = lambda: (doing, 2.0), 3.25
    stop.handle(signal.SIGINT, None)
    assert first in capfd.readouterr().err
    stop.handle(signal.SIGINT, None)
    said = capfd.readouterr().err
    assert f"stopping: {doing} for 2 s; a step takes 3.2 s; then it is saved" in said
    assert stop.reason == "SIGINT"


def test_other_signals_get_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    stop.handle(signal.SIGTERM, None)
    assert (stop.reason, capfd.readouterr().err) == ("SIGTERM", "")


@pytest.mark.parametrize(
    "words",
    [
        ["data_prep/shard_imagenet.py", "SRC", "OUT", "--split", "train"],
        ["data_prep/shard_coco.py", "X.json", "SRC", "OUT", "--split", "train"],
        ["data_prep/shard_ade.py", "SRC", "OUT", "--split", "train"],
    ],
)
def test_data_tools_answer_while_they_start(words: list[str], tmp_path: Path) -> None:
    """The signal comes while numpy is imported; each tool can answer before it imports numpy."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, REPOSITORY / words[0], *words[1:]],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 85, done.stderr
    assert done.stderr == "stopped; the same command starts again\n"
