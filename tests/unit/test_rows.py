"""Rows of a record wait for room on a full disk, and none is lost, doubled or cut."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mae_scale.train.records import read_metrics
from mae_scale.train.sinks import Rows


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size; to write more is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_rows_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path, 0)
    rows.write({"step": 1, "text": "x" * 50})
    size = path.stat().st_size
    with room_for(size + 10):
        for step in range(2, 50):
            rows.write({"step": step, "text": "x" * 50})
        rows.sync()
        assert path.stat().st_size == size and steps(path) == [1]  # not a part of a row
    assert caplog.text.count("its rows wait in memory") == 1
    with caplog.at_level(logging.INFO, "mae_scale"):
        rows.sync()
    assert "can be written again" in caplog.text
    assert steps(path) == list(range(1, 50))
    with room_for(path.stat().st_size):
        rows.write({"step": 50})
        rows.write({"step": 51})
        rows.close()
    assert "lacks the rows of steps 50 to 51" in caplog.text
    assert steps(path) == list(range(1, 50))


def test_a_resume_keeps_what_others_have_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "time": "odd"}, {"step": 2, "loss": []}, {"step": 3}, {"no": "step"}]
    lines += [{"step": 2, "loss": "a second time"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    Rows(path, 2).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]
