"""The view of a run for a person: the bar, a loss that grows, and a line for each run of a
folder."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest

from mae_scale.cli import main
from mae_scale.train import metrics
from mae_scale.train.metrics import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_bar_fits_and_says_what_one_looks_for(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(500_000, 123_456, 312)
    progress.advance()
    progress.show({"loss": 0.43211, "grad_norm": 1.0, "lr": 1e-4, "images_per_second": 12345.6,
                   "data_wait": 0.1, "epoch": 395.69, "step": 123_457, "samples": 1e6})  # fmt: skip
    progress.close()
    lines = re.split(r"[\r\n]", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= min(80, columns)
    if columns >= 80:
        last = [line for line in lines if line.strip()][-1]
        for part in ("epoch 395.69", "step 123457/500000", "loss 0.4321", "12346 img/s", "ETA "):
            assert part in last


def grown(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> int:
    said: list[str] = []
    monkeypatch.setattr(metrics.log, "warning", lambda text, *_: said.append(text))
    growth = metrics.Growth()
    for step, loss in enumerate(losses, start=1):
        growth.add(step, loss, 1e-3)
    assert all(text.startswith("the loss grows") for text in said)
    return len(said)


@pytest.mark.parametrize(
    ("losses", "lines"),
    [
        ([1.0] * 100, 0),
        ([2 * 0.99**i for i in range(300)], 0),
        ([1.0, 0.5, 2.0, 0.7, 1.1] * 30, 0),
        ([1.0] * 20 + [9.0] + [1.0] * 20, 0),  # one bad batch
        ([1.05**i for i in range(60)], 1),
        ([1.05**i for i in range(250)], 5),  # a line for each power of ten
        ([1.0] * 50 + [4.0] * 50, 1),
        ([math.nan] * 30, 0),
    ],
)
def test_a_loss_that_grows_is_named(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], lines: int
) -> None:
    assert grown(monkeypatch, losses) == lines


def write_run(folder: Path, step: int = 0, **more: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("task: pretrain\nmodel: {name: mae_vit_tiny_patch16}\n")
    if step:
        row = {"step": step, "epoch": 1.5, "samples": 8 * step, "loss": 0.5, "lr": 0.1,
               "grad_norm": 1.0, "images_per_second": 10.0, "data_wait": 0.0, "time": 1.0,
               **more}  # fmt: skip
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        events = [{"event": "started", "step": 0, "time": 0.5, "total_steps": 2 * step},
                  {"event": "stopped", "step": step, "time": 1.0}]  # fmt: skip
        (folder / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_a_folder_of_runs_gives_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "seed0" / "pretrain" / "a-name-that-is-longer-than-its-column", 1_000_000)
    write_run(tmp_path / "seed0" / "pretrain" / "b", 7, loss=None)
    write_run(tmp_path / "c\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("[")
    (tmp_path / "b" / "logs").mkdir(parents=True)
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= 80
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert "cannot be read" in by_name["broken"]
    assert "stopped" in by_name["seed0/pretrain/b"] and "7/14" in by_name["seed0/pretrain/b"]
    assert "no number" in by_name["seed0/pretrain/b"]
    (long,) = [line for name, line in by_name.items() if name.endswith("-its-column")]
    assert "1000000/2000000" in long and "50%" in long
    assert "not started" in by_name["c\\n"]


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err
