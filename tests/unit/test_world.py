"""Who a process is, from what torchrun, deepspeed and srun set."""

from __future__ import annotations

import os

import pytest

from mae_scale.errors import CommonError
from mae_scale.launch.distributed import World
from mae_scale.train.run_dir import IDLE_RESTARTS, note_restart, read_history
from mae_scale.world import cpus

# As srun sets them for the first task of the second of three nodes with 2, 2 and 1 tasks.
TASK = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


@pytest.fixture(autouse=True)
def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a launcher's variables."""
    for name in list(os.environ):
        if name.startswith("SLURM") or name.endswith("RANK") or name.endswith("WORLD_SIZE"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASK)
    assert World.from_environment() == World(2, 5, 0, 2)
    set_all(monkeypatch, {"SLURM_PROCID": "4", "SLURM_NODEID": "2"})
    assert World.from_environment() == World(4, 5, 0, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_ID": None},  # a batch script
        {"SLURM_STEP_ID": "4294967291"},  # the same, in newer versions
        {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
    ],
)
def test_by_hand_in_an_allocation(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None]
) -> None:
    values = {**TASK, **changed}
    set_all(monkeypatch, {name: value for name, value in values.items() if value is not None})
    assert World.from_environment() == World()


def test_torchrun_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASK)
    ranks = {"RANK": "7", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    set_all(monkeypatch, ranks)
    assert World.from_environment() == World(7, 16, 3, 4)


def test_cpus_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert cpus() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cpus() == 2
    set_all(monkeypatch, {**TASK, "SLURM_CPUS_PER_TASK": "7"})
    assert cpus() == 7


def test_restarts_that_get_nowhere_end(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    note_restart(tmp_path, 0)
    assert read_history(tmp_path) == []  # the first start of a job is none
    set_all(monkeypatch, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    for step in (0, 0, 40, 40):  # progress in between
        note_restart(tmp_path, step)
    for _ in range(IDLE_RESTARTS - 2):
        note_restart(tmp_path, 40)
    with pytest.raises(CommonError, match="job 12 3 times without getting beyond step 40"):
        note_restart(tmp_path, 40)
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # submitted again by hand, and restarted
    note_restart(tmp_path, 40)
