"""Wide images of five bands through every command, from a folder of arrays to an export."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import Run

from mae_scale.cli import main
from mae_scale.data.bands import Bands
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.tasks.trained import TrainedRun, best_checkpoint

WHITE = 10_000  # the value of a band that counts as white
WRONG = (6, 12, 18)  # fields that look like water, and stay wrong however the sums are rounded


def as_bands(photograph: Path, water: bool) -> np.ndarray:
    """Make reflectances of five bands, uint16 [H, W, 5], out of a photograph; water takes up the
    light of the two last ones, in the near infrared."""
    with Image.open(photograph) as image:
        colours = np.asarray(image.convert("RGB").resize((80, 60))).astype(np.float64) / 255
    grey = colours.mean(axis=-1)
    more = [0.1 * grey, 0.05 * grey] if water else [0.5 + grey / 2, 0.4 + grey / 2]
    return np.round(np.dstack([colours, *more]) * WHITE).astype(np.uint16)


@pytest.fixture(scope="module")
def place(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of arrays in two classes, shards of it, and its statistics."""
    place = tmp_path_factory.mktemp("bands")
    for number, photograph in enumerate(sorted(imagenet_tree.rglob("*.JPEG"))[:32]):
        folder = place / "arrays" / ("field", "water")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        water = number % 2 == 1 or number in WRONG
        np.save(folder / f"{number:02d}.npy", as_bands(photograph, water))
    arrays, shards = str(place / "arrays"), str(place / "shards")
    assert main(["shard", arrays, shards, "--split", "train", "--samples-per-shard", "20"]) == 0
    assert main(["verify", shards]) == 0
    command = ["stats", shards, "--in_chans", "5", "--value_range", "0", str(WHITE)]
    assert main([*command, "--out", str(place / "stats.yaml")]) == 0
    return place


def settings(place: Path) -> dict[str, object]:
    stats = yaml.safe_load((place / "stats.yaml").read_text())
    return {
        "model.img_size": "[16, 64]",  # 2 x 8 patches, as many as of a square
        "model.depth": 2,
        **{f"data.{key}": value for key, value in stats["data"].items()},
        "model.in_chans": stats["model"]["in_chans"],
        "data.val": place / "shards",
        "train.global_batch_size": 8,
        "train.epochs": 2,
        "train.max_steps": 3,
    }


@pytest.fixture(scope="module")
def pretrained(place: Path) -> Run:
    own = {
        **settings(place),
        "model.mask_ratio": 0.5,
        "train.reconstruct_every": 3,
        "train.probe_every": 3,
    }
    run = Run(place / "pretrained", place / "shards", own)
    run.finish()
    return run


@pytest.fixture(scope="module")
def tuned(place: Path, pretrained: Run) -> Run:
    own = {
        **settings(place),
        "weights": pretrained.run_dir,
        "augment.rand_augment": "null",
        "optim.base_lr": 0.05,
        "train.max_steps": 8,
    }
    run = Run(place / "tuned", place / "shards", own, task="finetune")
    output = run.finish()
    assert "resized" not in output and "new fc_norm (2), head (2)" in output
    return run


def test_statistics_are_those_of_the_arrays(place: Path) -> None:
    values = np.stack([np.load(p) for p in sorted((place / "arrays").rglob("*.npy"))])
    found = yaml.safe_load((place / "stats.yaml").read_text())
    assert found["model"] == {"in_chans": 5} and found["data"]["value_range"] == [0, WHITE]
    flat = values.reshape(-1, 5) / WHITE
    np.testing.assert_allclose(found["data"]["mean"], flat.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(found["data"]["std"], flat.std(axis=0), atol=1e-3)


def test_the_range_of_the_values_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(place / "shards")
    assert main(["stats", shards, "--in_chans", "5"]) == 0
    shown = capsys.readouterr().out
    assert "# band 4: 0 to " in shown and "(uint16)" in shown and "# of 32 of 32 images" in shown
    assert main(["stats", shards, "--in_chans", "5", "--value_range", "auto"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]
    assert len(found["value_range"]) == 5 and all(0 <= a < b for a, b in found["value_range"])
    assert all(0.2 < mean < 0.8 for mean in found["mean"])
    pairs = [str(value) for pair in found["value_range"] for value in pair]
    assert main(["stats", shards, "--in_chans", "5", "--value_range", *pairs]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"] == found
    for wrong in (["0"], ["0", "x"], ["0", "inf"], ["5", "5"], ["0", "1", "2", "3"]):
        assert main(["stats", shards, "--in_chans", "5", "--value_range", *wrong]) == 2
        assert "--value_range" in capsys.readouterr().err
    assert main(["stats", shards, "--in_chans", "4"]) == 1
    assert "has 5 bands, expected 4" in capsys.readouterr().err


def test_pretraining_draws_and_probes(pretrained: Run, place: Path, tmp_path: Path) -> None:
    assert len(pretrained.rows()) == 3
    assert [row["step"] for row in pretrained.rows("validation.jsonl")] == [3]
    with Image.open(pretrained.run_dir / "reconstructions/step-00000003.png") as picture:
        assert picture.width == 4 * 192 + 3 * 6 + 2 * 16  # four tiles, wider than those of squares
    out = tmp_path / "drawn.png"
    arrays = str(place / "arrays")
    assert main(["reconstruct", str(pretrained.run_dir), arrays, "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    export = tmp_path / "export.pth"
    assert main(["export", str(pretrained.run_dir), "--to", "official", str(export)]) == 0
    again = tmp_path / "again.png"
    assert main(["reconstruct", str(export), arrays, "--out", str(again)]) == 0
    with Image.open(out) as one, Image.open(again) as other:
        pixels = [np.asarray(image)[60:] for image in (one, other)]  # without the title
    np.testing.assert_array_equal(*pixels)
    encoder = tmp_path / "timm"
    assert main(["export", str(pretrained.run_dir), "--to", "timm", str(encoder)]) == 0
    found = []
    for number, weights in enumerate((pretrained.run_dir, export, encoder)):
        features = tmp_path / f"{number}.npy"
        command = ["features", str(weights), str(place / "shards"), "--workers", "0"]
        assert main([*command, "--img_size", "16x48", "--out", str(features)]) == 0
        found.append(np.load(features))
        assert found[-1].shape == (32, 192)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_model_is_evaluated_predicts_and_is_exported(
    tuned: Run,
    pretrained: Run,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results.json"
    command = ["evaluate", str(tuned.run_dir), f"val={place / 'shards'}", "--workers", "0"]
    tables = ["--tables", str(tmp_path / "tables")]
    assert main([*command, "--out", str(results), *tables]) == 0
    found = json.loads(results.read_text())["sets"]["val"]
    validated = max(tuned.rows("validation.jsonl"), key=lambda row: row["top1"])
    assert found["top1"] == validated["top1"]
    assert found["loss"] == pytest.approx(validated["loss"], rel=1e-5)
    rows = list(csv.reader((tmp_path / "tables" / "val-confusion.csv").open()))
    assert rows[0] == ["class", "field", "water"]
    counts = np.array([row[1:] for row in rows[1:]], int)
    assert counts.tolist() == [[13, 3], [0, 16]]
    assert found["top1"] == 100 * 29 / 32
    classes = list(csv.DictReader((tmp_path / "tables" / "val-classes.csv").open()))
    assert [row["class"] for row in classes] == ["field", "water"]
    assert int(classes[0]["times"]) == counts[0, 1] and int(classes[1]["times"]) == counts[1, 0]
    assert float(classes[0]["top1"]) == pytest.approx(100 * counts[0, 0] / 16, abs=0.01)

    seen = tmp_path / "seen"
    command = ["predict", str(tuned.run_dir), str(place / "arrays"), "--out", str(seen)]
    assert main(command) == 0
    rows = list(csv.DictReader((seen / "predictions.csv").open()))
    assert len(rows) == 32 and {row["class1"] for row in rows} <= {"field", "water"}

    folder, file = tmp_path / "timm", tmp_path / "official.pth"
    for to, export in (("timm", folder), ("official", file)):
        assert main(["export", str(tuned.run_dir), "--to", to, str(export)]) == 0
        command = ["evaluate", str(export), f"val={place / 'shards'}", "--workers", "0"]
        assert main([*command, "--out", str(results)]) == 0
        scores = json.loads(results.read_text())["sets"]["val"]
        assert scores["loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert scores["per_class"] == found["per_class"]
        command = ["predict", str(export), str(place / "arrays"), "--out", str(tmp_path / to)]
        assert main(command) == 0
        again = list(csv.DictReader((tmp_path / to / "predictions.csv").open()))
        for one, other in zip(rows, again, strict=True):
            assert one["class1"] == other["class1"]
            assert float(one["score1"]) == pytest.approx(float(other["score1"]), abs=2e-6)
    assert "images of 5 bands" in (folder / "README.md").read_text()
    for size in ("16x48", "[16, 48]"):
        values = []
        for weights in (tuned.run_dir, folder, file):
            command = ["evaluate", str(weights), f"val={place / 'shards'}", "--workers", "0"]
            assert main([*command, "--img_size", size, "--out", str(results)]) == 0
            values.append(json.loads(results.read_text())["sets"]["val"]["loss"])
        assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (5, 16, 64)
    trained = TrainedRun.read(best_checkpoint(tuned.run_dir))
    bands = Bands.of(trained.config)
    assert tuple(data["mean"]) == bands.mean and tuple(data["std"]) == bands.std
    model = trained.model().eval()
    model.load_state_dict(trained.weights())
    images = torch.rand(2, 5, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    source = str(pretrained.run_dir)
    assert main(["export", source, "--to", "huggingface", str(tmp_path / "hf")]) == 2
    assert "ViTMAE takes square images only" in capsys.readouterr().err


def test_settings_that_do_not_go_with_five_bands(place: Path, tmp_path: Path) -> None:
    own = {**settings(place), "augment.rand_augment": "rand-m9-mstd0.5-inc1"}
    run = Run(tmp_path / "run", place / "shards", own, task="finetune")
    output = run.finish(2)
    assert "augment.rand_augment" in output and "takes three bands, not 5" in output
    assert not run.run_dir.exists()
    with pytest.raises(UserError, match=r"mae-scale stats .* --in_chans 5"):
        trained = TrainedRun.read(best_checkpoint(place / "pretrained"))
        trained.config.data.mean = None
        Bands.of(trained.config)
    assert open_shards(place / "shards").classes == ["field", "water"]
