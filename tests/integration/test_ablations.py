"""Pre-training with each switch of Table 1, stopped and resumed; and tables of such runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import SMALL, Run, ranks
from torch import nn
from torch.nn import functional as F

from mae_scale.cli import main
from mae_scale.commands.sweep import SWEEPS, table
from mae_scale.config.parsing import recipe_names
from mae_scale.inference.model import read_model
from mae_scale.launch.stopping import STOPPED
from mae_scale.train.checkpoint import find_checkpoint

RAW = {"model.norm_pix_loss": False, "model.depth": 2}


class Ids(nn.Module):
    """A TorchScript tokenizer whose ids are 16 shades of green, one id for 4 x 4 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.avg_pool2d(x[:, 1], 4) * 15.999).long()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "green ids.pt"
    torch.jit.save(torch.jit.script(Ids()), path)
    return path


SWITCHES: dict[str, dict[str, Any]] = {
    "pca": {"model.target": "pca", "model.pca_components": 20, "train.precision": "bf16",
            "augment.crop": "none"},
    "tokens": {"model.target": "tokens", "model.vocabulary_size": 16, "augment.color_jitter": 0.4},
    "mask tokens": {"model.mask_tokens_in_encoder": True, "model.mask_sampling": "block",
                    "augment.crop": "fixed"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", SWITCHES)
def test_stopped_it_equals_an_undisturbed_run(
    run: Run, tmp_path: Path, tokenizer: Path, name: str
) -> None:
    """A run under ZeRO-3 on two processes goes on exactly; on one process its loss differs by
    rounding."""
    settings = {**RAW, **SWITCHES[name], "deepspeed": "zero3", "train.max_steps": 12}
    if name == "tokens":
        settings["model.tokenizer"] = tokenizer
    run = replace(run, launcher="torchrun", processes=2, settings=settings)
    whole = replace(run, run_dir=tmp_path / "whole")
    whole.finish()
    run.stop(4, lambda process: ranks(process)[1].terminate(), 1)
    at = len(run.rows())
    assert 4 <= at < 12
    one = replace(run, launcher="", processes=1, settings={**settings, "train.max_steps": at + 1})
    other = replace(one, run_dir=tmp_path / "other")
    subprocess.run(["cp", "-r", run.run_dir, other.run_dir], check=True)
    assert "converting it for 1" in other.finish()
    run.finish()
    assert run.rows() == whole.rows() and len(whole.rows()) == 12
    tolerance = 0.01 if name == "pca" else 1e-4
    expected = pytest.approx(whole.rows()[at]["loss"], rel=tolerance)
    assert other.rows()[at]["loss"] == expected
    model = read_model(find_checkpoint(run.run_dir), "autoencoder").model
    if name == "pca":
        eye = model.pca.components @ model.pca.components.T
        torch.testing.assert_close(eye, torch.eye(20), rtol=0, atol=1e-5)  # whole, not in bf16
        assert model.pca.mean.abs().max() > 0.01
        again = read_model(find_checkpoint(other.run_dir), "autoencoder").model.pca
        assert torch.equal(again.components, model.pca.components)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.target": "tokens", "model.norm_pix_loss": False}, "model.tokenizer None"),
        ({"model.tokenizer": "x.pt"}, "model.target pixels with model.tokenizer x.pt"),
        (
            {"model.target": "tokens", "model.norm_pix_loss": False, "model.tokenizer": "no.pt"},
            "there is no file no.pt; the target tokens needs a TorchScript module",
        ),
        ({"model.target": "pca"}, "with target pca it must be false"),
        ({"model.mask_sampling": "grid", "model.mask_ratio": 0.5}, "one of every four"),
        ({"model.mask_sampling": "blok"}, "mask_sampling"),
        ({"augment.color_jitter": 2}, 'augment.color_jitter": 2 is not a number from 0 to 1'),
        ({"augment.crop": "centre"}, "augment.crop"),
    ],
)
def test_bad_switches_get_one_line_and_leave_nothing(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    settings: dict,
    message: str,
) -> None:
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    command = replace(run, settings=settings).command()
    assert main(command[command.index("pretrain") :]) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and error.startswith("mae-scale: error: ") and "\n" not in error
    assert not run.run_dir.exists()


def write_sweep(path: Path, **changes: Any) -> Path:
    small = {**SMALL, "data.workers": 0, "train.epochs": 1, "optim.warmup_epochs": 0,
             "model.depth": 2}  # fmt: skip
    classifier = {k: v for k, v in small.items() if "decoder" not in k and "reconstruct" not in k}
    classifier["train.global_batch_size"] = 48  # five steps
    content = {
        "title": "Sampling",
        "seeds": [3],
        "pretrain": {**small, "train.max_steps": 2, "train.reconstruct_every": None},
        "finetune": classifier,
        "linprobe": classifier,
        "rows": [
            {"name": "random", "paper": {"finetune": 84.9, "linprobe": 73.5}},
            {"name": "grid", "linprobe": None, "pretrain": {"model.mask_sampling": "grid"}},
            {"name": "last block", "linprobe": None, "finetune": {"train.tune_blocks": 1}},
            {"name": "from scratch", "pretrain": None, "linprobe": None},
        ],
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def sweep(file: Path, shards: Path, val: Path, out: Path, *options: str) -> list[str]:
    data = [f"--data.train={shards}", f"--data.val={val}", f"--run_dir={out}"]
    return [sys.executable, "-m", "mae_scale", "sweep", str(file), *data, *options]


def test_a_sweep_is_stopped_and_goes_on(tmp_path: Path, shards: Path, val_shards: Path) -> None:
    """One signal stops it; runs with equal settings are trained once; the table shows final
    accuracies."""
    file, out = write_sweep(tmp_path / "my sweep.yaml"), tmp_path / "all runs"
    command = sweep(file, shards, val_shards, out)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    while not (out / "seed3/finetune/random/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "top-1" not in output
    one = subprocess.run([*command, "--row", "3"], capture_output=True, text=True)
    assert one.returncode == 0 and "from scratch" in one.stdout, one.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(str(path.parent.relative_to(out)) for path in out.rglob("config.yaml"))
    assert found == sorted(
        f"seed3/{run}"
        for run in ("pretrain/random", "pretrain/grid", "finetune/random", "linprobe/random",
                    "finetune/grid", "finetune/last-block", "finetune/from-scratch")
    )  # fmt: skip
    results = json.loads((out / "sweep.json").read_text())
    assert [row["name"] for row in results] == ["random", "grid", "last block", "from scratch"]
    rows = (out / "seed3/finetune/grid/validation.jsonl").read_text().splitlines()
    assert results[1]["finetune"] == [json.loads(rows[-1])["top1"]]
    line = next(line for line in done.stdout.splitlines() if line.startswith("random "))
    assert line.split()[-1] == "73.5" and "84.9" in line
    again = subprocess.run([*command, "--table"], capture_output=True, text=True)
    assert again.stdout == done.stdout[-len(again.stdout) :] and "grid" in again.stdout


def test_a_table_of_several_seeds() -> None:
    results = [
        {"name": "a", "finetune": [50.0, 60.0], "linprobe": [1.0, None], "paper": {"finetune": 80}},
        {"name": "a longer name", "finetune": [None, None], "paper": {}},
    ]
    lines = table("Title", results).splitlines()
    assert lines[0] == "Title" and lines[2].split() == ["fine-tuning", "linear", "probing"]
    assert lines[4].split() == ["a", "55.00", "(50.00-60.00)", "80.0", "1", "of", "2", "runs"]
    assert lines[5].split() == ["a", "longer", "name", "0", "of", "2", "runs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None}, "is no sweep"),
        ({"lines": []}, "unknown key 'lines'"),
        ({"rows": [{"name": "a", "finetun": {}}]}, "row a: unknown key 'finetun'"),
        (
            {"rows": [{"name": "a", "finetune": {"optim.bas_lr": 1}}]},
            "did you mean 'optim.base_lr'",
        ),
        ({"rows": [{"name": "a"}, {"name": "A", "finetune": {"optim.min_lr": 1}}]}, "two rows"),
        ({"rows": [{"name": "a", "finetune": None, "linprobe": None}]}, "neither finetune nor"),
        ({"rows": []}, "rows"),
        ({"seeds": 3}, "seeds: input should be a valid list, not 3"),
        ({"seeds": ["x"]}, "seeds"),
        ({"title": [1]}, "title"),
        ({"pretrain": 3}, "pretrain: input should be a valid dictionary, not 3"),
        ({"rows": [{"name": "a\0b"}]}, "control character"),
        ({"rows": [{"name": "a", "finetune": {"model.name": "a\0b"}}]}, "control character"),
        ({"rows": [{"name": "a", "finetune": {"config": "a\0b"}}]}, "neither a file nor a recipe"),
        ({"rows": [{"name": "a", "paper": {"finetune": "x"}}]}, "row a: paper"),
        ({"rows": [{"name": "***"}]}, "has no letter and no digit"),
    ],
)
def test_sweeps_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    file = write_sweep(tmp_path / "sweep.yaml", **changes)
    command = sweep(file, Path("/nowhere"), Path("/nowhere"), tmp_path / "out")
    assert main(command[3:]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_not_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = sweep(write_sweep(tmp_path / "s.yaml"), tmp_path, tmp_path, tmp_path / "out")
    assert main(command[3:]) == 2
    assert "start a sweep alone" in capsys.readouterr().err


def test_a_sweep_ends_at_bad_settings(tmp_path: Path, shards: Path) -> None:
    file = write_sweep(tmp_path / "sweep.yaml")
    command = sweep(file, tmp_path / "no shards", shards, tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("sweep: run") == 1
    assert done.stderr.count("\n") == 1 and "does not exist" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_papers_tables_are_there_and_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    assert [name[:7] for name in names] == ["figure5", *(f"table1{letter}" for letter in "abcdef")]
    assert not set(names) & set(recipe_names())
    for name in names:
        command = sweep(Path(name), Path("/x"), Path("/x"), Path("/nowhere"), "--table")
        assert main(command[3:]) == 0
        printed = capsys.readouterr().out
        assert "73.5" in printed and printed.count("\n") >= 6
