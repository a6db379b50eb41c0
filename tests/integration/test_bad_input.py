"""Bad input gets one clear line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, Run

from mae_scale.cli import main


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands that run in this process from taking over its signals."""
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)


def pretrain(run_dir: Path, shards: Path, **settings: Any) -> int:
    values = {**SMALL, "run_dir": run_dir, "data.train": shards}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return main(["pretrain", *(f"--{key}={value}" for key, value in values.items())])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__train": "/nowhere"}, "/nowhere"),
        ({"data__train": "a\udcff"}, "config key \"data.train\": 'a\\udcff' is not UTF-8"),
        (
            {"model__img_size": 30},
            "img_size 30 is no multiple of model.patch_size 8; nearest: 24, 32",
        ),
        ({"model__mask_ratio": 1.0}, "1.0 is not a number between 0 and 1"),
        ({"model__mask_ratio": 0}, "0 is not a number between 0 and 1"),
        ({"model__name": "mae_vit_bas_patch16"}, "mae_vit_base_patch16"),
        ({"train__global_batch_size": 26}, "is not a multiple of train.micro_batch_size 4"),
        ({"train__global_batch_size": 2500}, "fewer than one global batch"),
        ({"train__activation_checkpointing": 0}, "activation_checkpointing"),
        ({"deepspeed": "zero4"}, "did you mean 'zero"),
        ({"data__lanes": 0}, "lanes"),
        ({"data__window": 0}, "window"),
        ({"data__workers": -1}, "data.workers"),
        ({"train__epochs": 0}, "train.epochs"),
        ({"train__log_every": 0}, "train.log_every"),
        ({"checkpoint__keep": 0}, "checkpoint.keep"),
    ],
)
def test_settings(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str], settings: dict, message: str
) -> None:
    assert pretrain(tmp_path / "run", shards, **settings) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and error.startswith("mae-scale: error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_shard_folder(
    tmp_path: Path, imagenet_tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run", imagenet_tree) == 2
    error = capfd.readouterr().err
    assert str(imagenet_tree) in error and "mae-scale shard" in error


def test_a_run_dir_of_another_config_and_one_that_is_none(tmp_path: Path, shards: Path) -> None:
    run = Run(tmp_path / "run", shards, {"train.max_steps": 1})
    run.finish()
    before = {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()}
    run.settings |= {"model.mask_ratio": 0.6, "seed": 7}
    output = run.finish(2)
    assert "model.mask_ratio: 0.75 -> 0.6; seed: 0 -> 7" in output
    assert {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()} == before
    assert "exists and is no run folder" in Run(shards, shards).finish(2)


def test_many_processes_say_it_once(tmp_path: Path, shards: Path) -> None:
    settings = {"train.global_batch_size": 25}
    run = Run(tmp_path / "run", shards, settings, launcher="deepspeed", processes=2)
    assert run.finish(2).count("mae-scale: error:") == 1


def test_sharding_what_is_not_there_or_holds_no_images(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "data_prep" / "shard_imagenet.py"
    empty = tmp_path / "empty folder"
    empty.mkdir()
    for source, message in ((tmp_path / "nowhere", "nowhere"), (empty, "empty folder")):
        command = [sys.executable, script, source, tmp_path / "out", "--split", "train"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["no run", "no images", "no image file", "no png"])
def test_reconstruct(
    tmp_path: Path, imagenet_tree: Path, shards: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    image = next(imagenet_tree.rglob("*.JPEG"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    arguments = {
        "no run": [str(tmp_path), str(image)],
        "no images": [str(tmp_path), str(tmp_path / "empty")],
        "no image file": [str(tmp_path), str(tmp_path / "nowhere.jpg")],
        "no png": [str(tmp_path), str(image), "--out", str(tmp_path / "x.txt")],
    }[what]
    assert main(["reconstruct", *arguments]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_installed_without_the_checkout(tmp_path: Path) -> None:
    """`pip install .` installs the recipes and DeepSpeed configs, too."""
    repository = Path(__file__).parents[2]
    site = tmp_path / "site packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*pip, repository], check=True, capture_output=True)
    code = (
        "import mae_scale, sys; from mae_scale.config.parsing import recipe_names; "
        "from mae_scale.config.deepspeed import load_deepspeed_config; "
        "load_deepspeed_config('zero3_offload'); print(mae_scale.__file__, recipe_names())"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert str(site) in shown.stdout and "pretrain_vit_huge" in shown.stdout, shown.stderr


@pytest.mark.parametrize("words", [["--trust", "status"], ["pretrain", "--trust"]])
def test_the_two_meanings_of_trust(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "--trust-pickle" in error and "--trust-index" in error
