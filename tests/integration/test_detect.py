"""`mae-scale detect` as users start and stop it."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from runs import Run, ranks

from mae_scale.cli import main
from mae_scale.errors import UserError
from mae_scale.inference.export import export
from mae_scale.launch.stopping import STOPPED
from mae_scale.models import build_mae
from mae_scale.models.dense_weights import fit_to_dense
from mae_scale.models.weights import read_weights
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.tasks.trained import TrainedRun, best_checkpoint

TINY = {
    "model.patch_size": 16,
    "model.img_size": 64,
    "model.embed_dim": 96,
    "model.depth": 4,
    "model.window": 3,
    "model.channels": 8,
    "model.hidden": 16,
    "model.rois": 8,
    "model.proposals": 20,
    "model.detections": 5,
    "data.workers": 0,
    "data.lanes": 2,
    "data.window": 4,
    "train.epochs": 2,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.validate_epochs": 1,
    "optim.base_lr": 0.02,
    "optim.warmup_epochs": 0,
    "optim.warmup_steps": 2,
    "checkpoint.every_steps": 1,
}
TOTAL = 8  # steps: two epochs; 17 images with an object, in batches of 4
LI_2021 = {
    "model.pyramid": "fpn",
    "model.norm": "batch",
    "model.relative": "shared",
    "model.positions": "fixed",
    "model.window": 2,
    "augment.recipe": "li2021",
    "optim.schedule": "cosine",
    "optim.no_decay": "[layer_norm, channel_norm, position, relative]",
    "optim.layer_decay": 1,
}


def make_coco(root: Path, photographs: list[Path], images: int) -> None:
    """Make a folder in COCO's layout: rectangles on photographs, every tenth image without one."""
    generator = np.random.default_rng(0)
    folder = root / "train2017"
    folder.mkdir(parents=True)
    listed, annotations = [], []
    for i in range(images):
        with Image.open(photographs[i % len(photographs)]) as opened:
            image = opened.convert("RGB").resize((90, 70))
        for j in range(0 if i % 10 == 9 else 1 + i % 3):
            x, y = generator.integers(0, 50, 2).tolist()
            w, h = generator.integers(15, 40, 2).tolist()
            x1, y1 = min(90, x + w), min(70, y + h)
            color = (250, 20, 20) if j % 2 else (20, 20, 250)
            ImageDraw.Draw(image).rectangle((x, y, x1 - 1, y1 - 1), fill=color)
            box = [x, y, x1 - x, y1 - y]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + j % 2,
                 "iscrowd": 0, "bbox": box, "area": box[2] * box[3],
                 "segmentation": [[x, y, x1, y, x1, y1, x, y1]]}
            )  # fmt: skip
        image.save(folder / f"{i:012d}.jpg")
        listed.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 70, "width": 90})
    content = {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco_shards(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards of 19 images, two of them without an object."""
    root = tmp_path_factory.mktemp("coco for detect")
    make_coco(root / "coco", sorted(imagenet_tree.rglob("*.JPEG"))[:6], images=19)
    assert shard(root / "coco", root / "shards", Options("train", samples_per_shard=7)) == 0
    return root / "shards"


@pytest.fixture
def detecting(coco_shards: Path, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", coco_shards, {**TINY}, task="detect")


@pytest.fixture(scope="module")
def whole(coco_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run without interruption, from the encoder of a pre-trained model."""
    folder = tmp_path_factory.mktemp("detect")
    torch.manual_seed(0)
    mae = build_mae(
        "mae_vit_tiny_patch16", img_size=28, patch_size=14, embed_dim=96, depth=4,
        decoder_depth=1,
    )  # fmt: skip
    torch.save({"model": mae.state_dict()}, folder / "mae.pth")
    settings = {
        **TINY, "weights": folder / "mae.pth", "data.val": coco_shards, "model.drop_path": 0.2,
        "optim.ema_decay": 0.9, "train.activation_checkpointing": "full",
    }  # fmt: skip
    run = Run(folder / "run", coco_shards, settings, task="detect")
    run.finish()
    return run


def stop_and_go_on(whole: Run, folder: Path, code: int) -> None:
    """Stop a run and resume it; its losses and validations equal those of the whole run, bit for
    bit."""
    run = replace(whole, run_dir=folder)

    def terminate_one_rank(process: subprocess.Popen[str]) -> None:
        (ranks(process)[-1] if run.processes > 1 else process).terminate()

    run.stop(3, terminate_one_rank, code)
    assert 3 <= len(run.rows()) < TOTAL
    run.finish()
    assert run.rows() == whole.rows() and len(whole.rows()) == TOTAL
    validations = whole.rows("validation.jsonl")
    assert run.rows("validation.jsonl") == validations
    assert [row["step"] for row in validations] == [4, 8]
    assert all(row["images"] == 19 for row in validations)


def test_vitdet_stops_and_goes_on_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    """Recomputed blocks, dropped paths and drawn proposals are the same after the stop."""
    stop_and_go_on(whole, tmp_path / "run", STOPPED)
    assert "ema_box_ap" in whole.rows("validation.jsonl")[0]


def test_li2021_stops_and_goes_on_bit_for_bit(detecting: Run, tmp_path: Path) -> None:
    """The run has two processes that share batch-norm statistics, ZeRO-3 and bf16."""
    detecting.settings |= {
        **LI_2021, "deepspeed": "zero3", "data.val": detecting.shards, "model.drop_path": 0.2,
        "train.precision": "bf16",
    }  # fmt: skip
    run = replace(detecting, launcher="torchrun", processes=2)
    run.finish()
    stop_and_go_on(run, tmp_path / "stopped", 1)


def test_it_goes_on_at_other_world_sizes_and_stages(whole: Run, tmp_path: Path) -> None:
    run = replace(whole, run_dir=tmp_path / "run")
    for steps, processes, stage in ((3, 1, 2), (6, 2, 3), (TOTAL, 1, 0)):
        part = replace(run, processes=processes, launcher="torchrun" * (processes > 1))
        part.settings = {
            **part.settings, "train.max_steps": steps, "deepspeed": f"zero{stage}"
        }  # fmt: skip
        part.finish()
    rows, undisturbed = run.rows(), whole.rows()
    assert [row["samples"] for row in rows] == [row["samples"] for row in undisturbed]
    assert [row["lr"] for row in rows] == [row["lr"] for row in undisturbed]
    # Each process draws the proposals that train the heads, so losses agree only in part.
    for row, other in zip(rows, undisturbed, strict=True):
        assert math.isclose(row["loss"], other["loss"], rel_tol=0.25)


def test_the_encoder_is_exported(whole: Run, tmp_path: Path) -> None:
    export(whole.run_dir, "official", tmp_path / "encoder.pth")
    with torch.device("meta"):
        model = TrainedRun.read(best_checkpoint(whole.run_dir)).model()
    state = fit_to_dense(read_weights(tmp_path / "encoder.pth"), model.backbone)
    assert state.keys() == model.backbone.state_dict().keys()
    with pytest.raises(UserError, match="no windows and no relative positions"):
        export(whole.run_dir, "timm", tmp_path / "timm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.img_size": 80}, "must be a multiple of 32"),
        ({"model.window": -1}, "model.window"),
        ({"augment.scale": "[2.0, 0.1]"}, "augment.scale"),
        ({"train.global_batch_size": 20, "train.micro_batch_size": 1}, "fewer than one global"),
        ({"data.train": "classification"}, "holds shards for classification"),
        ({"data.val": "classification"}, "holds shards for classification"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing(
    settings: dict[str, Any],
    message: str,
    detecting: Run,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands run in this process and must not take over its signals."""
    monkeypatch.setattr("mae_scale.launch.stopping.catch_signals_early", lambda: None)
    values = {k: shards if v == "classification" else v for k, v in settings.items()}
    bad = replace(detecting, settings={**detecting.settings, **values})
    assert main(["detect", *bad.arguments()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not bad.run_dir.exists()


def test_predict_draws_the_objects(whole: Run, imagenet_tree: Path, tmp_path: Path) -> None:
    photographs = [str(path) for path in sorted(imagenet_tree.rglob("*.JPEG"))[:2]]
    out = tmp_path / "seen"
    command = ["predict", str(whole.run_dir), *photographs, "--score", "0"]
    assert main([*command, "--out", str(out)]) == 0
    for photograph in map(Path, photographs):
        facts = json.loads((out / f"{photograph.name}.json").read_text())
        assert facts["task"] == "detect" and 0 < len(facts["objects"]) <= 5
        for found in facts["objects"]:
            assert found["name"] in ("blue", "red") and 0 <= found["score"] <= 1
            x, y, w, h = found["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0
            assert x + w <= facts["width"] + 1 and y + h <= facts["height"] + 1
            assert found["segmentation"]["size"] == [facts["height"], facts["width"]]
        with Image.open(out / f"{photograph.name}.png") as picture:
            assert picture.width >= facts["width"]
    assert not (out / "predictions.csv").exists()
