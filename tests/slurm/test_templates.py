"""`sbatch slurm/….sbatch` as users type it, on a real cluster of two nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Job
from runs import SMALL, Run

from mae_scale.train.run_dir import read_history

pytestmark = pytest.mark.alone

TEMPLATES = (
    "pretrain", "finetune", "linprobe", "detect", "segment", "evaluate", "shard_imagenet", "sweep",
)  # fmt: skip
TWO = "--nodes=2 --ntasks-per-node=1"  # a start of four tasks takes twice as long
STEPS = 70


@dataclass
class Training:
    """One `sbatch slurm/pretrain.sbatch` and its folder."""

    cluster: Cluster
    templates: Path
    shards: Path
    folder: Path  # folder of the logs and the run
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        """Give the run, so that a test can look at its metrics."""
        return Run(self.folder / "run dir", self.shards)

    def arguments(self) -> list[str]:
        """Give the arguments that follow the template's name."""
        settings = {
            **SMALL,
            "run_dir": "run dir",
            "data.train": self.shards,
            "train.micro_batch_size": 2,
            "train.epochs": 1000,
            "train.max_steps": STEPS,
            "checkpoint.every_steps": 10,
            **self.settings,
        }
        return [f"--{key}={value}" for key, value in settings.items()]

    def submit(self, options: str, site: Path | None = None) -> Job:
        """Submit the job from its folder, with a run_dir relative to that folder."""
        template = self.templates / "pretrain.sbatch"
        return self.cluster.submit(
            template, *self.arguments(), cwd=self.folder, options=options, site=site
        )

    def wait_for_step(self, job: Job, step: int) -> None:
        """Wait until the metrics have this step; a restart may remove some rows before."""
        job.wait_for(lambda: (self.run.rows() or [{"step": 0}])[-1]["step"] >= step, f"step {step}")

    def events(self) -> list[str]:
        """Give the events in the history of the run."""
        events = [row["event"] for row in read_history(self.run.run_dir)]
        return [event for event in events if event != "saved"]


def preempt(cluster: Cluster) -> None:
    """Run a job of a higher partition that needs all nodes."""
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=2"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    )
    Job(cluster, urgent.strip(), Path("/dev/null")).finish()


@pytest.fixture
def training(cluster: Cluster, templates: Path, shards: Path, tmp_path: Path) -> Training:
    """Give a run in a folder of its own."""
    return Training(cluster, templates, shards, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, templates: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    """Train a run on two nodes, without interruption."""
    training = Training(cluster, templates, shards, tmp_path_factory.mktemp("undisturbed"))
    output = training.submit(TWO).finish()
    assert "preflight: 2 ranks on n1 (1), n2 (1); CPU; mae-scale" in output
    assert "slurm: finished" in output and "error" not in output.replace("srun: error", "")
    return training


@pytest.mark.parametrize("name", TEMPLATES)
def test_slurm_accepts_the_template(cluster: Cluster, templates: Path, name: str) -> None:
    cluster.run("sbatch", "--test-only", "--nodes=2", templates / f"{name}.sbatch", "--x")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(templates: Path) -> None:
    files = sorted([*templates.glob("*.sbatch"), *templates.glob("*.sh")])
    assert len(files) == len(TEMPLATES) + 2
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_two_nodes_finish(undisturbed: Training) -> None:
    assert [row["step"] for row in undisturbed.run.rows()] == list(range(1, STEPS + 1))
    assert undisturbed.events() == ["started", "finished"]


def test_finetune_linprobe_and_evaluate(undisturbed: Training, tmp_path: Path) -> None:
    """They run on two nodes from a pre-trained run, and the moving average is evaluated."""
    shards = undisturbed.shards
    settings = {"weights": undisturbed.run.run_dir, "data.val": shards, "train.epochs": 1,
                "train.micro_batch_size": 2, "optim.warmup_epochs": 0}  # fmt: skip
    average = {"optim.ema_decay": 0.9, "train.precision": "fp32"}
    tuned = Run(tmp_path / "fine tuned", shards, {**settings, **average}, task="finetune")
    probed = Run(tmp_path / "probed", shards, settings, task="linprobe")
    evaluate = [tuned.run_dir, f"val={shards}", "--ema", "--out=results.json"]
    for name, arguments in (
        ("finetune", tuned.arguments()),
        ("linprobe", probed.arguments()),
        ("evaluate", evaluate),
    ):
        template = undisturbed.templates / f"{name}.sbatch"
        job = undisturbed.cluster.submit(template, *arguments, cwd=tmp_path, options=TWO)
        assert "slurm: finished" in job.finish(), name
    (row,) = probed.rows("validation.jsonl")
    assert row["images"] == 250
    (row,) = tuned.rows("validation.jsonl")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sets"]["val"]["loss"] == pytest.approx(row["ema_loss"], rel=1e-6)


def test_preempted_and_then_a_node_is_lost(training: Training, undisturbed: Training) -> None:
    """The job is requeued each time, and its loss curve is that of an undisturbed run."""
    cluster = training.cluster
    job = training.submit(f"{TWO} --partition=low")
    training.wait_for_step(job, 12)
    preempt(cluster)
    assert "stopped by SIGTERM" in job.output()
    assert "slurm: saved; requeueing job" in job.output()
    saved = training.run.rows()[-1]["step"]
    assert 12 <= saved < STEPS
    job.wait_for_text(f"going on from step-{saved:08d}")
    training.wait_for_step(job, min(saved + 12, STEPS - 12))
    cluster.kill_node("n2")
    job.wait_for(lambda: job.record()["Restarts"] == "2", "Slurm notices the loss of a node")
    cluster.start_node("n2")
    output = job.finish()
    assert "Node failure on n2" in output
    assert training.run.rows() == undisturbed.run.rows()
    assert training.events() == [
        *("started", "stopped", "restarted", "resumed", "restarted", "resumed", "finished")
    ]


def test_preemption_without_grace(training: Training) -> None:
    """Slurm takes the job back itself; KillWait is enough for the save."""
    training.settings = {"train.max_steps": 40}
    job = training.submit("--nodes=1 --ntasks=2 --partition=harsh")
    training.wait_for_step(job, 5)
    preempt(training.cluster)
    output = job.finish()
    assert "slurm: saved; Slurm has requeued the job" in output
    assert [row["step"] for row in training.run.rows()] == list(range(1, 41))
    assert training.events() == ["started", "stopped", "restarted", "resumed", "finished"]


def test_time_limit_scancel_and_going_on_with_one_node(training: Training) -> None:
    """The job goes on after its time limit by itself; then it is stopped, and goes on with one
    node."""
    training.settings = {"train.max_steps": 100_000}
    job = training.submit(f"{TWO} --time=1 --signal=USR1@5")
    job.wait_for_text("slurm: saved; requeueing job", seconds=120)
    assert job.output().count("stopped by SIGUSR1") == 1
    crossed = training.run.rows()[-1]["step"]
    training.wait_for_step(job, crossed + 2)
    training.cluster.run("scancel", job.number)
    output = job.finish("CANCELLED", 85)
    assert output.endswith("saved, and cancelled: the job ends; sbatch goes on from here\n")
    rows = training.run.rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))

    training.settings = {"train.max_steps": len(rows) + 3}
    output = training.submit("--nodes=1 --ntasks=1").finish()
    assert f"going on from step-{len(rows):08d}" in output
    assert "preflight: 1 ranks on n1 (1)" in output
    assert "was saved by 2 processes under ZeRO-1; converting it for 1" in output
    assert training.run.rows()[: len(rows)] == rows and len(training.run.rows()) == len(rows) + 3


def test_a_wrong_config_fails_once(training: Training) -> None:
    training.settings = {"train.global_batch_size": 25}
    job = training.submit(TWO)
    output = job.finish("FAILED", 2)
    assert output.count("mae-scale: error:") == 1
    assert "train.global_batch_size 25 is not a multiple" in output
    assert job.record()["Restarts"] == "0" and not training.run.run_dir.exists()


def test_one_task_per_gpu(training: Training) -> None:
    """Site settings ask for GPUs, which exist only for Slurm: PyTorch sees none."""
    training.settings = {"train.max_steps": 2}
    site = training.folder / "my site.sh"
    text = (training.templates / "site.sh").read_text()
    for line, edited in (
        ("# export SBATCH_GPUS_PER_NODE=8", "export SBATCH_GPUS_PER_NODE=2"),
        ("# export SBATCH_EXCLUSIVE=exclusive", "export SBATCH_EXCLUSIVE=exclusive"),
        ("MAE_INTERFACE=${MAE_INTERFACE:-}", "MAE_INTERFACE=lo"),
    ):
        assert line in text
        text = text.replace(line, edited)
    site.write_text(text)
    output = training.submit("--nodes=2", site).finish("FAILED", 2)
    assert output.count("mae-scale: error:") == 1
    assert "n1 has no usable GPU although SLURM_GPUS_ON_NODE=2: no driver is loaded here" in output
    site.write_text(text + "export MAE_SCALE_DEVICE=cpu\n")
    output = training.submit("--nodes=2", site).finish()
    assert "preflight: 4 ranks on n1 (2), n2 (2); CPU" in output
    assert "--ntasks-per-node=2 --cpus-per-task=2" in output and "--gpu-bind=none" in output
    assert "--distribution=block:block" in output
