"""Resuming at any world size and ZeRO stage from any other, also after interruptions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Run

from mae_scale.files import checksums
from mae_scale.train import elastic


@pytest.mark.parametrize(("precision", "sizes"), [("fp32", "24"), ("bf16", "13")])
def test_all_pairs_of_world_sizes_and_stages(tmp_path: Path, precision: str, sizes: str) -> None:
    """Every weight and moment is the same bit for bit; the losses agree within 1e-4 in fp32.

    Each number of processes is tried in one precision only, since pairs are many.
    """
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("all_pairs.py"), tmp_path, precision, *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " -> " in line]
    compared = [line for line in lines if "compared 63" in line]
    # Pairs of 5 configs at each size, without those read unconverted: the same size and stage
    # (three stages with one config, and zero3 and zero3_offload).
    assert len(compared) == (5 * len(sizes)) ** 2 - 7 * len(sizes), done.stdout
    assert lines == compared, [line for line in lines if line not in compared]


CONVERT_AND_DIE = """
import os, signal, sys
from pathlib import Path

import torch

from mae_scale.train import elastic

folder, writes, *order = sys.argv[1:]
left = int(writes)
save = torch.save


def save_and_die(*args):
    global left
    save(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_and_die
elastic.convert(Path(folder), 2, order)
"""


def convert_and_die(folder: Path, order: list[str], writes: int) -> int:
    """Convert in a process that is killed after so many files, and give its exit code."""
    command = [sys.executable, "-c", CONVERT_AND_DIE, folder, str(writes), *order]
    return subprocess.run(command).returncode


def test_a_conversion_killed_anywhere_is_made_again(run: Run) -> None:
    run.settings = {"deepspeed": "zero2", "train.max_steps": 2, "model.depth": 2}
    run.finish()
    folder = run.run_dir / "checkpoints" / "step-00000002"
    shapes = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    order = [name for group in shapes for name in group]
    unfinished = folder / "universal.unfinished"
    last = len(order) * 3 + 1
    for writes in (1, last // 2, last, 10_000):
        killed = writes < 10_000
        assert convert_and_die(folder, order, writes) == (-signal.SIGKILL if killed else 0)
        assert unfinished.exists() is killed and (folder / "universal").exists() is not killed
    whole = checksums(folder / "universal")
    # A damaged conversion is made again, with the same content.
    (folder / "universal" / "common.pt").write_bytes(b"")
    elastic.convert(folder, 2, order)
    assert checksums(folder / "universal") == whole
    # The conversion is no part of the checkpoint: damage in it leaves the checkpoint valid.
    next((folder / "universal" / "zero").rglob("*.pt")).unlink()
    run.settings |= {"deepspeed": "zero0", "train.max_steps": 5, "checkpoint.keep": 1}
    output = run.finish()
    assert "universal is damaged; converting again" in output
    assert re.search(r"going on from step-00000002", output)
    assert [p.name for p in folder.parent.glob("step-*")] == ["step-00000005"]
