"""The commands of docs/my_images.md, from a folder of pictures to `mae-scale predict`."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import Run

from mae_scale.cli import main
from mae_scale.data.transforms import decode_image, default_crop_ratio, eval_crop, normalize
from mae_scale.tasks.trained import TrainedRun, best_checkpoint


@pytest.fixture
def photographs(imagenet_tree: Path, tmp_path: Path) -> Path:
    """Make a folder with JPEGs, one in a subfolder, a PNG with alpha, and a file that is no
    image."""
    folder = tmp_path / "my photographs"
    (folder / "holidays").mkdir(parents=True)
    first, second, third, *_ = sorted(imagenet_tree.rglob("*.JPEG"))
    shutil.copy(first, folder / "a.jpg")
    shutil.copy(second, folder / "holidays" / "a.JPEG")
    with Image.open(third) as image:
        image.convert("RGBA").resize((20, 90)).save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(first.read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def tuned(imagenet_tree: Path, tmp_path: Path) -> Path:
    """Train the page's recipe, shrunk, on 20 pictures of two classes, 4 of them kept for
    validation."""
    for number, photograph in enumerate(sorted(imagenet_tree.rglob("*.JPEG"))[:20]):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(photograph) as image:
            image.convert("RGB").save(folder / f"{number}.{('jpg', 'png')[number % 3 == 0]}")
    for split in ("train", "val"):
        source, out = str(tmp_path / "pictures"), str(tmp_path / "shards" / split)
        assert main(["shard", source, out, "--split", split, "--val-share", "0.2"]) == 0
    shards = tmp_path / "shards"
    settings = {
        "config": "finetune_folder", "weights": "null", "data.val": shards / "val",
        "model.depth": 2, "train.epochs": 6, "train.global_batch_size": 8,
        "train.max_steps": 2, "train.class_weights": "balanced", "augment.hflip": "false",
    }  # fmt: skip
    run = Run(tmp_path / "run", shards / "train", settings, task="finetune")
    run.finish()
    return run.run_dir


def test_names_and_scores_of_a_fine_tuned_model(
    tuned: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "seen"
    command = [sys.executable, "-m", "mae_scale", "predict", tuned, photographs]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "--top", "7"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1  # since one is broken
    assert "1 of 4 images cannot be read" in done.stderr and "Traceback" not in done.stderr
    trained = TrainedRun.read(best_checkpoint(tuned))
    model = trained.model().eval()
    model.load_state_dict(trained.weights())
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    names = ["a.jpg", "holidays/a.JPEG", "narrow.png"]
    assert [row["file"] for row in rows] == [str(photographs / name) for name in names]
    for row, name in zip(rows, names, strict=True):
        image = decode_image(Path(row["file"]).read_bytes())
        crop = eval_crop(image, 32, default_crop_ratio(32))
        with torch.no_grad():
            best = model(normalize(crop[None]))[0].softmax(0).topk(2)
        classes = [trained.classes[i] for i in best.indices.tolist()]
        assert [row[f"class{i}"] for i in range(1, 6)] == [*classes, "", "", ""]
        for i, score in enumerate(best.values.tolist(), 1):
            assert float(row[f"score{i}"]) == pytest.approx(score, abs=1e-5)
        facts = json.loads((out / f"{name}.json").read_text())
        assert [each["name"] for each in facts["classes"]] == classes
        with Image.open(out / f"{name}.png") as picture:
            assert picture.mode == "RGB"
    assert not list(out.rglob("broken*"))
