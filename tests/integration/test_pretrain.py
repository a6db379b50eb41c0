"""`mae-scale pretrain` as users start and stop it: real processes, real DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from runs import Run, handles_sigterm, ranks, send

from mae_scale.launch.stopping import STOPPED
from mae_scale.train.run_dir import read_history

# The answer to Ctrl-C, such as «stopping after this step».
ANSWER = re.compile("^mae-scale: stopping (after|once) .+; press again to see how long", re.M)
TOTAL = 20  # steps: two epochs of 250 // 24 steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Run:
    """Train a run on one process without interruption."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", shards)
    run.finish()
    return run


def test_leaves_what_the_contract_promises(undisturbed: Run) -> None:
    rows = undisturbed.rows()
    assert [row["step"] for row in rows] == list(range(1, TOTAL + 1))
    assert [row["samples"] for row in rows] == [24 * step for step in range(1, TOTAL + 1)]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["lr"] == 0 and rows[10]["lr"] == pytest.approx(1.5e-4 * 24 / 256)
    assert rows[-1]["epoch"] == 2 and rows[-1]["mfu"] is None
    assert rows[-1]["loss"] < rows[0]["loss"]
    folder = undisturbed.run_dir
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["epochs"] == 2 and config["data"]["lanes"] == 4
    assert list((folder / "tensorboard").iterdir())
    commit = json.loads((folder / "checkpoints/step-00000020/COMMITTED.json").read_text())
    assert (commit["step"], commit["samples"], commit["world_size"]) == (20, 480, 1)


def test_a_finished_run_says_so(undisturbed: Run) -> None:
    before = (undisturbed.run_dir / "metrics.jsonl").read_bytes()
    assert "is finished: 20 of 20 steps" in undisturbed.finish()
    assert (undisturbed.run_dir / "metrics.jsonl").read_bytes() == before


def test_max_hours_stops_as_a_signal_does(run: Run, undisturbed: Run) -> None:
    run.settings = {"train.max_hours": 1e-9}
    assert "stopped by train.max_hours after step" in run.finish(STOPPED)
    assert 0 < len(run.rows()) < TOTAL
    run.settings = {"train.max_hours": 24}
    run.finish()
    assert run.rows() == undisturbed.rows()


def test_repeats_go_on_as_if_nothing_had_happened(run: Run, tmp_path: Path) -> None:
    settings = {"data.repeats": 2, "train.max_steps": 4}
    run.settings = {**settings, "train.max_hours": 1e-9}
    run.finish(STOPPED)
    assert 0 < len(run.rows()) < 4
    run.settings = {**settings, "train.max_hours": 24}
    run.finish()
    whole = replace(run, run_dir=tmp_path / "whole", settings=settings)
    whole.finish()
    assert run.rows() == whole.rows()
    assert [row["samples"] for row in whole.rows()] == [24, 48, 72, 96]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_stream_does_not_depend_on_the_world_size(
    run: Run, undisturbed: Run, processes: int
) -> None:
    """Another micro-batch and no data workers change nothing either: only the order of sums
    differs."""
    settings = {"data.workers": 0, "train.micro_batch_size": 24 // processes, "train.max_steps": 5}
    run = replace(run, launcher="torchrun", processes=processes, settings=settings)
    run.finish()
    for row, expected in zip(run.rows(), undisturbed.rows()[:5], strict=True):
        assert row["samples"] == expected["samples"] and row["lr"] == expected["lr"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "launcher", "code"),
    [
        (0, "torchrun", 1),  # torchrun itself exits with 1, whatever its ranks exited with
        (1, "torchrun", 1),
        (2, "deepspeed", STOPPED),
        (3, "torchrun", 1),
    ],
)
def test_an_interrupted_run_equals_an_undisturbed_one(
    run: Run, tmp_path: Path, stage: int, launcher: str, code: int
) -> None:
    settings = {"deepspeed": f"zero{stage}", "data.workers": 2, "train.max_steps": 12}
    run = replace(run, launcher=launcher, processes=2, settings=settings)

    def terminate_one_rank(process: subprocess.Popen[str]) -> None:
        ranks(process)[stage % 2].terminate()

    output = run.stop(4, terminate_one_rank, code)
    assert "the same command goes on" in output
    stopped_at = len(run.rows())
    assert 4 <= stopped_at < 12
    assert f"going on from step-{stopped_at:08d}" in run.finish()
    whole = replace(run, run_dir=tmp_path / "whole")
    whole.finish()
    assert run.rows() == whole.rows()
    events = [(e["event"], e["step"]) for e in read_history(run.run_dir)]
    assert events == [("started", 0), ("saved", stopped_at), ("stopped", stopped_at),
                      ("resumed", stopped_at), ("finished", 12)]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2,
                                    signal.SIGXCPU, signal.SIGHUP])  # fmt: skip
def test_a_signal_to_the_whole_group_saves_and_goes_on(
    run: Run, undisturbed: Run, number: signal.Signals
) -> None:
    """As with Ctrl-C, data workers get the signal, too, and it comes twice."""

    def twice(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)

    run.settings = {"data.workers": 2}
    output = run.stop(3, twice, STOPPED)
    assert f"stopped by {number.name}" in output and "Traceback" not in output
    assert len(ANSWER.findall(output)) == (number == signal.SIGINT)
    run.finish()
    assert run.rows() == undisturbed.rows()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_stops_it(run: Run, number: signal.Signals) -> None:
    process = run.start()
    while not handles_sigterm(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert "Traceback" not in output
    if number == signal.SIGINT:
        assert "mae-scale: stopped before the run began" in output or ANSWER.search(output), output
    run.settings = {"train.max_steps": 2}
    run.finish()


@pytest.mark.parametrize("background_gb", [0.25, 0])
def test_sigkill_loses_no_more_than_the_steps_since_the_last_save(
    run: Run, undisturbed: Run, background_gb: float
) -> None:
    run.settings = {"checkpoint.every_steps": 3, "checkpoint.background_gb": background_gb,
                    "data.workers": 2}  # fmt: skip
    run.stop(8, send(signal.SIGKILL), -signal.SIGKILL)
    committed = [path.parent.name for path in run.run_dir.glob("checkpoints/*/COMMITTED.json")]
    # Written in the background, step 6 may not have been committed yet.
    assert max(committed) >= ("step-00000006" if background_gb else "step-00000003")
    output = run.finish()
    assert f"going on from {max(committed)}" in output
    assert run.rows() == undisturbed.rows()


def test_a_damaged_checkpoint_is_named_and_passed_over(run: Run, undisturbed: Run) -> None:
    run.settings = {"checkpoint.every_steps": 2, "train.max_steps": 6}
    run.finish()
    checkpoints = run.run_dir / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == [
        "step-00000002", "step-00000004", "step-00000006",
    ]  # fmt: skip
    damaged = checkpoints / "step-00000006" / "mp_rank_00_model_states.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    unfinished = checkpoints / "step-00000008"  # the state that a kill during the save leaves
    unfinished.mkdir()
    (unfinished / "mp_rank_00_model_states.pt").write_bytes(b"half of it")
    run.settings["train.max_steps"] = TOTAL
    output = run.finish()
    assert "step-00000006 is damaged and passed over" in output
    assert "mp_rank_00_model_states.pt does not match its checksum" in output
    assert "going on from step-00000004" in output
    assert run.rows() == undisturbed.rows()
    kept = sorted(p.name for p in checkpoints.glob("step-*"))
    assert kept == ["step-00000016", "step-00000018", "step-00000020"]


def test_milestones_are_kept(run: Run) -> None:
    run.settings = {"checkpoint.milestone_epochs": 1, "checkpoint.keep": 1, "train.epochs": 3}
    run.finish()
    kept = sorted(p.name for p in (run.run_dir / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000020", "step-00000030"]


def test_two_jobs_cannot_train_in_one_folder(run: Run) -> None:
    run.settings = {"train.epochs": 1000}
    first = run.start()
    while not run.rows():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # the other one waits a while, and the machine is shared
    assert "another process is training in" in run.finish(2)
    first.send_signal(signal.SIGCONT)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == STOPPED


def test_bf16_and_activation_checkpointing_and_offload(run: Run) -> None:
    settings = {"train.precision": "bf16", "train.max_steps": 2, "deepspeed": "zero3_offload",
                "train.activation_checkpointing": "full"}  # fmt: skip
    run.settings = settings
    run.finish()
    losses = [row["loss"] for row in run.rows()]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_other_shards_under_an_old_run_are_refused(
    run: Run, tmp_path: Path, undisturbed: Run
) -> None:
    other = tmp_path / "other shards"
    other.mkdir()
    for file in undisturbed.shards.iterdir():
        (other / file.name).symlink_to(file)
    (other / "manifest.json").unlink()
    manifest = json.loads((undisturbed.shards / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "split": "other"}))
    moved = replace(undisturbed, shards=other)
    assert "data.train holds other shards" in moved.finish(2)


@pytest.mark.timeout(900)
def test_a_finished_run_exits_0_every_time(run: Run) -> None:
    """Ranks must end together: one that ended early used to make the other abort."""
    for attempt in range(3):
        again = replace(
            run,
            run_dir=run.run_dir.with_name(f"run {attempt}"),
            launcher="deepspeed",
            processes=2,
            settings={"train.max_steps": 2, "deepspeed": "zero2", "data.workers": attempt},
        )
        again.finish()


def test_the_number_of_processes_and_the_zero_stage_may_change(run: Run, undisturbed: Run) -> None:
    """A run grows and shrinks; samples and states carry over."""
    legs = [(2, 1), (3, 3), (1, 0)]  # test_elastic.py has all pairs
    for number, (processes, stage) in enumerate(legs):
        settings = {
            "deepspeed": f"zero{stage}",
            "train.max_steps": 3 * (number + 1),
            "train.micro_batch_size": 4,
        }
        leg = replace(run, launcher="torchrun", processes=processes, settings=settings)
        output = leg.finish()
        assert ("converting it for" in output) is (number > 0)
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row, expected in zip(rows, undisturbed.rows()[:9], strict=True):
        assert (row["samples"], row["lr"]) == (expected["samples"], expected["lr"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


BUG = """
from mae_scale import cli
from mae_scale.train.loop import Loop
def run(self, batches, **options):
    next(batches)
    raise ZeroDivisionError("a bug")
Loop.run = run
cli.entry()
"""


def test_a_bug_leaves_its_traceback_and_exit_code_1(run: Run) -> None:
    """The process does not abort as an interpreter does that ends while gloo's threads run."""
    command = [sys.executable, "-c", BUG, run.task, *run.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "ZeroDivisionError: a bug" in done.stderr


def test_a_damaged_file_of_a_checkpoint_gets_one_line(run: Run) -> None:
    """The checksum fits the damaged file, as if somebody had made the file so."""
    run.settings = {"train.max_steps": 3}
    run.finish()
    step = run.run_dir / "checkpoints" / "step-00000003"
    commit = json.loads((step / "COMMITTED.json").read_text())
    (step / "mp_rank_00_model_states.pt").write_bytes(b"no weights")
    facts = {"bytes": 10, "sha256": hashlib.sha256(b"no weights").hexdigest()}
    commit["files"]["mp_rank_00_model_states.pt"] = facts
    del commit["sha256"]  # as an older version wrote it
    (step / "COMMITTED.json").write_text(json.dumps(commit))
    run.settings = {}
    output = run.finish(2)
    assert "mp_rank_00_model_states.pt cannot be read as a checkpoint's file" in output
    assert "Traceback" not in output


def test_a_launcher_that_is_ended_ends_its_ranks(run: Run, undisturbed: Run) -> None:
    """`deepspeed` dies of SIGTERM at once; its ranks save, and the next start waits for them."""
    run = replace(run, launcher="deepspeed", processes=2, settings={"deepspeed": "zero2"})
    output = run.stop(3, send(signal.SIGTERM), -signal.SIGTERM)
    assert "stopped by the end of the launcher" in output
    output = run.finish()
    assert "going on from step-" in output
    for row, expected in zip(run.rows(), undisturbed.rows(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
