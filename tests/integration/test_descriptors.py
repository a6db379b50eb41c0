"""File descriptors of the ranks: ranks start under a low limit, and each needs few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import free_port

from mae_scale.errors import UserError
from mae_scale.launch import descriptors

WORKER = Path(__file__).with_name("descriptors_worker.py")


def open_files(folder: Path, ranks: int) -> list[int]:
    """Count the open files of each rank after a step; ranks begin under a limit of 64 files."""
    out, store = folder / f"{ranks}.json", free_port()
    processes = []
    for rank in range(ranks):
        env = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store, "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, WORKER, out],
                env={**os.environ, **{name: str(value) for name, value in env.items()}},
            )
        )
    assert [process.wait(300) for process in processes] == [0] * ranks
    counts, limits = json.loads(out.read_text())
    assert limits == [4096, 4096]
    return counts


def test_ranks_start_under_a_low_limit_and_need_what_is_checked(tmp_path: Path) -> None:
    few, more = open_files(tmp_path, 2), open_files(tmp_path, 4)
    for counts in (few, more):
        for rank, count in enumerate(counts):
            assert count <= descriptors.needed(rank, len(counts)) - descriptors.OWN / 2
    slope = (more[0] - few[0]) / 2, (max(more[1:]) - few[1]) / 2
    assert slope[0] <= descriptors.PER_RANK_ON_RANK0 and slope[1] <= descriptors.PER_RANK


def test_too_low_a_hard_limit_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(descriptors, "raise_limit", lambda: 1024)
    descriptors.make_room(0, 64)
    assert not caplog.records
    descriptors.make_room(0, 200)
    assert "rank 0 of 200 may have 1024 open files; 700, and 512 for shards" in caplog.text
    descriptors.make_room(300, 400)
    with pytest.raises(UserError, match="rank 0 of 512 may have 1024 open files and needs 1636"):
        descriptors.make_room(0, 512)
