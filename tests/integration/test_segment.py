"""`mae-scale segment`, and `evaluate` and `predict` on its runs, as users start and stop them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import REPOSITORY, Run, send

from mae_scale.cli import main
from mae_scale.errors import STOPPED
from mae_scale.models import build_mae
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from shapes import write_ade

SMALL = {
    "model.img_size": 32,
    "model.embed_dim": 48,
    "model.depth": 6,
    "model.channels": 8,
    "model.auxiliary_channels": 8,
    "train.epochs": 4,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.validate_epochs": 2,
    "optim.base_lr": 0.05,
    "optim.warmup_epochs": 0,
    "optim.warmup_steps": 2,
    "checkpoint.every_steps": 3,
    "data.window": 4,
}
TOTAL = 16  # steps: four epochs of 17 // 4 steps


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make shards of 17 scenes for training and of 5 others for validation."""
    root = tmp_path_factory.mktemp("scenes")
    write_ade(root / "ade", 17, 5, 48)
    folders = {split: root / split for split in ("train", "val")}
    for split, folder in folders.items():
        shard(root / "ade", folder, Options(split, samples_per_shard=10))
    return {**folders, "images": root / "ade/images/validation"}


@pytest.fixture(scope="module")
def whole(scenes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run without interruption, from the encoder of a pre-trained model."""
    folder = tmp_path_factory.mktemp("segment")
    torch.manual_seed(0)
    mae = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8, embed_dim=48, depth=6)
    torch.save({"model": mae.state_dict()}, folder / "mae.pth")
    settings = {**SMALL, "data.val": scenes["val"], "weights": folder / "mae.pth"}
    run = Run(folder / "run", scenes["train"], settings, task="segment")
    run.finish()
    return run


def test_it_stops_and_goes_on_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    run = replace(whole, run_dir=tmp_path / "run")
    run.stop(2, send(signal.SIGTERM), STOPPED)
    assert len(run.rows()) < TOTAL
    run.finish()
    assert run.rows() == whole.rows()
    assert run.rows("validation.jsonl") == whole.rows("validation.jsonl")
    assert [row["images"] for row in run.rows("validation.jsonl")] == [5, 5]


def test_it_goes_on_at_another_world_size_and_stage(whole: Run, tmp_path: Path) -> None:
    run = replace(
        whole, run_dir=tmp_path / "run", settings={**whole.settings, "train.max_steps": 4}
    )
    run.finish()
    run = replace(
        run, launcher="torchrun", processes=2,
        settings={**whole.settings, "train.micro_batch_size": 1, "deepspeed": "zero3"},
    )  # fmt: skip
    output = run.finish()
    assert "going on from step-00000004" in output
    losses, expected = ([row["loss"] for row in each.rows()] for each in (run, whole))
    # Micro-batches of 2 on one process are those of 1 on two: batch norm sees the same images.
    assert losses == pytest.approx(expected, abs=2e-2)


def test_evaluate_gives_what_validation_gave(
    whole: Run, scenes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process and two give the same; several scales with mirror images give other numbers."""
    last = json.loads((whole.run_dir / "validation.jsonl").read_text().splitlines()[-1])
    step = whole.run_dir / "checkpoints" / f"step-{TOTAL:08d}"
    out = tmp_path / "found.json"
    arguments = list(map(str, ("evaluate", step, f"val={scenes['val']}", "--out", out)))
    arguments += ["--workers", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "-m", "mae_scale"]
    expected = {key: last[key] for key in ("miou", "macc", "aacc", "images")}

    def scores() -> dict[str, float]:
        found = json.loads(out.read_text())["sets"]["val"]
        assert set(found["per_class"]) == {"disk", "square", "triangle", "photograph"}
        return {key: found[key] for key in expected}

    assert main(arguments) == 0
    assert scores() == expected
    assert f" {expected['miou']:.2f} " in capsys.readouterr().out
    subprocess.run([*torchrun, *arguments], check=True)
    assert scores() == expected
    assert main([*arguments, "--multi_scale"]) == 0
    several = scores()
    assert several["images"] == 5 and several != expected


def test_predict_draws_and_tells(
    whole: Run, scenes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen"
    command = ["predict", str(whole.run_dir), "--out", str(out)]
    assert main([*command, str(scenes["images"])]) == 0
    facts = json.loads((out / "00000.jpg.json").read_text())
    assert sum(each["share"] for each in facts["classes"]) == pytest.approx(1)
    with Image.open(out / facts["map"]) as classes:
        values = np.array(classes)
    assert values.shape == (48, 48)
    for each in facts["classes"]:
        assert (values == each["number"]).mean() == pytest.approx(each["share"])
    assert len(list(out.glob("*.jpg.png"))) == 5
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert main([*command, str(tmp_path / "broken.jpg")]) == 1
    assert "1 of 1 images cannot be read" in capsys.readouterr().err


def test_other_shards_are_refused(
    whole: Run,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands run in this process and must not take over its signals."""
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    run = replace(whole, run_dir=tmp_path / "run", shards=shards)
    assert main(["segment", *run.arguments()]) == 2
    assert "holds shards for classification" in capsys.readouterr().err
    assert not run.run_dir.exists()
