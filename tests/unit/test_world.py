"""The place of a process in its run, from the variables of torchrun, deepspeed and srun."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from mae_scale import world
from mae_scale.cli import main
from mae_scale.config.parsing import parse
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.errors import CommonError, UserError
from mae_scale.launch.distributed import World
from mae_scale.train.run_dir import IDLE_RESTARTS, note_restart, read_history
from mae_scale.world import compute_threads, cpus, data_workers, gpu_evidence

# The variables of srun for the first task of the second of three nodes with 2, 2 and 1 tasks.
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
    """Give an environment without a launcher's variables."""
    for name in list(os.environ):
        if (
            name.startswith(("SLURM", "CUDA_VISIBLE", "MAE_SCALE_DEVICE"))
            or name.endswith("RANK")
            or name.endswith("WORLD_SIZE")
        ):
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


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID",
                                     "SLURM_NODEID")
          for value in ("zero", "", "-1", "1.5", "9")),
        *((name, value) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS",
                                     "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
          for value in ("zero", "", "-1", "0")),
        ("SLURM_STEP_ID", "batch"),
        ("SLURM_STEP_NUM_TASKS", None),
        ("SLURM_NODEID", None),
        ("SLURM_STEP_TASKS_PER_NODE", None),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str | None,
    alone: bool,
) -> None:
    """A rank that is no number, or not below the number of ranks, ends before it waits for
    others."""
    if name.startswith("SLURM"):
        set_all(monkeypatch, {**TASK, "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "4"})
    elif not alone:
        set_all(monkeypatch, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
                              "LOCAL_WORLD_SIZE": "2"})  # fmt: skip
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert main(["features", "RUN", "SHARDS", "--out", "x.npy"]) == 2
    error = capsys.readouterr().err.strip()
    assert name in error and "\n" not in error and "must" in error


@pytest.fixture
def no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the quota of the container that the tests run in."""
    monkeypatch.setattr("mae_scale.world.CGROUPS", tmp_path)


@pytest.mark.usefixtures("no_quota")
def test_cpus_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert cpus() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cpus() == 2
    set_all(monkeypatch, {**TASK, "SLURM_CPUS_PER_TASK": "7"})
    assert cpus() == 7


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 12),
        ({"cpu.max": "max 100000\n"}, 12),
        ({"cpu.max": "350000 100000\n"}, 4),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 12),
        ({"cpu.max": "spoilt"}, 12),
        ({"cpu.max": "100000 0"}, 12),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 12),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_has_a_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr("mae_scale.world.CGROUPS", tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpus() == expected


@pytest.mark.usefixtures("no_quota")
def test_cpus_of_a_rank_of_torchrun_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks share the CPUs of the task: none has all of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(128))
    ranks = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    set_all(monkeypatch, {**TASK, "SLURM_CPUS_PER_TASK": "64", **ranks})
    assert cpus() == 8 and data_workers() == 7 and compute_threads() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))  # bound to fewer
    assert cpus() == 2 and data_workers() == 1 and compute_threads() == 1


@pytest.mark.parametrize(
    ("env", "evidence"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1,0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "none"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        (
            {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"},
            "CUDA_VISIBLE_DEVICES=GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        ),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1"}, "CUDA_VISIBLE_DEVICES=MIG-1"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], evidence: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_all(monkeypatch, env)
    assert gpu_evidence(env) == evidence
    if evidence is None:
        assert World().device == torch.device("cpu")
        return
    with pytest.raises(UserError, match=re.escape(f"although {evidence}: ")) as caught:
        _ = World().device
    assert "driver" in str(caught.value) and "MAE_SCALE_DEVICE=cpu" in str(caught.value)
    monkeypatch.setenv("MAE_SCALE_DEVICE", "cpu")
    assert World().device == torch.device("cpu")
    monkeypatch.setenv("MAE_SCALE_DEVICE", "tpu")
    with pytest.raises(UserError, match="must be cpu or auto"):
        _ = World().device


def test_the_drivers_version_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, version = tmp_path / "nvidia0", tmp_path / "version"
    assert gpu_evidence({}, device) is None
    device.touch()
    assert gpu_evidence({}, device) == f"there is {device}"
    assert gpu_evidence({"CUDA_VISIBLE_DEVICES": ""}, device) is None  # GPUs are hidden on purpose
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n")
    monkeypatch.setattr(world, "DRIVER_FILE", version)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"the driver is 470\.57\.02, PyTorch .* is built for"):
        _ = World().device


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"), [(1, 3, 0), (8, 3, 3), (8, 0, 0), (2, 1, 1)]
)
def test_the_gpu_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    """A rank that sees one GPU takes it, as under --gpus-per-task; otherwise its local rank
    chooses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert World(local_rank, 8, local_rank, 8).device == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("ranks", "micro", "expected"),
    [(1, 64, 64), (64, 64, 64), (128, 64, 32), (512, 64, 8), (4096, 64, 1), (3, 64, 64)],
)
def test_a_recipes_micro_batch_is_an_upper_bound(
    monkeypatch: pytest.MonkeyPatch, ranks: int, micro: int, expected: int
) -> None:
    """Three processes cannot share a batch of 4096; that stays an error of its own."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    needed = ["--run_dir", "r", "--data.train", "t", "--config", "pretrain_vit_base"]
    config = parse(PretrainConfig, needed, "test")
    assert config.train.micro_batch_size == expected
    asked = [*needed, "--train.micro_batch_size", str(micro)]
    assert parse(PretrainConfig, asked, "test").train.micro_batch_size == micro


def test_restarts_that_get_nowhere_end(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    note_restart(tmp_path, 0)
    assert read_history(tmp_path) == []  # the first start of a job is no restart
    set_all(monkeypatch, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    for step in (0, 0, 40, 40):  # progress in between
        note_restart(tmp_path, step)
    for _ in range(IDLE_RESTARTS - 2):
        note_restart(tmp_path, 40)
    with pytest.raises(CommonError, match="job 12 3 times without getting beyond step 40"):
        note_restart(tmp_path, 40)
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # submitted again by hand, and restarted
    note_restart(tmp_path, 40)
