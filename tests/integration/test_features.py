"""`mae-scale features` and `knn`, and probes during pre-training."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from runs import Run
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from make_shards import make_shards

from mae_scale.cli import main
from mae_scale.data.dataset import EvalDataset
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import default_crop_ratio, normalize
from mae_scale.inference.model import read_model
from mae_scale.launch.distributed import process_group
from mae_scale.train.knn import knn_scores
from mae_scale.train.linear import linear_scores
from mae_scale.watching.run_view import RunView
from mae_scale.world import World


@pytest.fixture(scope="module")
def labelled(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two shards of 41 photographs, four or five of each of ten classes."""
    images = [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[:41]]
    return make_shards(tmp_path_factory.mktemp("labelled") / "val", images, [11, 30])


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, shards: Path, labelled: Path) -> Run:
    """Train a run of two ranks under ZeRO-3 for five steps, with a probe every two steps."""
    settings = {
        "data.val": labelled,
        "train.probe_every": 2,
        "train.probe_linear": "true",
        "train.max_steps": 5,
        "deepspeed": "zero3",
        "model.depth": 2,
    }
    folder = tmp_path_factory.mktemp("probed")
    run = Run(folder / "run", shards, settings, launcher="torchrun", processes=2)
    run.finish()
    return run


def test_a_probe_changes_nothing_else(probed: Run, tmp_path: Path) -> None:
    settings = {**probed.settings, "train.probe_every": "null", "data.val": "null"}
    plain = replace(probed, run_dir=tmp_path / "plain", settings=settings)
    plain.finish()
    assert probed.rows() == plain.rows() and len(plain.rows()) == 5
    rows = probed.rows("validation.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(0 <= row["knn_top1"] <= row["knn_top5"] <= 100 for row in rows)
    assert all(0 <= row["linear_top1"] <= row["linear_top5"] <= 100 for row in rows)
    page = tmp_path / "report.html"
    assert main(["report", str(probed.run_dir), "--out", str(page)]) == 0
    assert "Validation: kNN top-1, %" in page.read_text()
    best = RunView(probed.run_dir).best_validation()
    assert best is not None and best[0] == "knn_top1"


def test_features_are_those_of_the_model_at_any_world_size(
    probed: Run, labelled: Path, tmp_path: Path
) -> None:
    one, two, table = tmp_path / "one.npy", tmp_path / "two.npy", tmp_path / "all\udcff.parquet"
    command = ["features", str(probed.run_dir), str(labelled), "--batch_size", "4"]
    assert main([*command, "--workers", "0", "--pool", "mean", "--out", str(one)]) == 0
    assert main([*command, "--workers", "0", "--pool", "mean", "--out", str(table)]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--pool", "mean", "--out", str(two), "--workers", "1"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "mae_scale", *command, *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "41 images, 192 values each" in done.stdout + done.stderr
    found = np.load(one)
    np.testing.assert_allclose(np.load(two), found, rtol=1e-5, atol=1e-6)
    shards = open_shards(labelled)
    encoder = read_model(probed.run_dir, "encoder", pool="mean")
    dataset = EvalDataset(shards, 32, default_crop_ratio(32))
    pixels = torch.stack([dataset.pixels(sample) for sample in range(41)])
    with torch.no_grad():
        expected = encoder.features(normalize(pixels)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    rows = list(csv.DictReader(one.with_suffix(".csv").open()))
    assert [row["key"] for row in rows] == [f"k{i}" for i in range(41)]
    assert [int(row["label"]) for row in rows] == [i % 10 for i in range(41)]
    columns = parquet.read_table(table.open("rb")).to_pydict()
    assert columns["key"] == [row["key"] for row in rows]
    assert columns["class"] == [row["class"] for row in rows]
    np.testing.assert_array_equal(np.array(columns["features"], np.float32), found)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "all\udcff.parquet", "one.csv", "one.npy", "two.csv", "two.npy",
    ]  # fmt: skip


def test_knn_of_the_command_is_that_of_the_probe(
    probed: Run, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "knn.json"
    command = ["knn", str(probed.run_dir), str(labelled), "--workers", "0", "--out", str(out)]
    assert main(command) == 0
    assert "top-5" in capsys.readouterr().out
    last, found = probed.rows("validation.jsonl")[-1], json.loads(out.read_text())
    assert (found["knn_top1"], found["knn_top5"]) == (last["knn_top1"], last["knn_top5"])
    # An image whose copy votes is its own nearest neighbour.
    picture = tmp_path / "neighbours.png"
    assert main([*command, str(labelled), "--neighbours", "1", "--picture", str(picture)]) == 0
    assert json.loads(out.read_text())["knn_top1"] == 100
    with Image.open(picture) as drawn:
        assert drawn.width > 7 * 320 and drawn.height > 8 * 320
        first, second = (np.asarray(drawn.crop((x, 40, x + 300, 340))) for x in (20, 360))
    assert np.array_equal(first, second)  # the image, and beside it its copy


@pytest.mark.parametrize("leave_out", [False, True])
def test_the_rule_of_dino(leave_out: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (60, 300))
    bank_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (60, 300))
    if leave_out:
        queries, labels = bank, bank_labels
    with process_group(World(), 600.0):
        found = knn_scores(bank, bank_labels, None if leave_out else queries, labels, 7)
    top1 = top5 = 0
    for i, query in enumerate(queries):
        cosines = [
            (float(torch.cosine_similarity(query, other, dim=0)), int(label))
            for j, (other, label) in enumerate(zip(bank, bank_labels, strict=True))
            if not (leave_out and i == j)
        ]
        votes: Counter[int] = Counter()
        for cosine, label in sorted(cosines, reverse=True)[:20]:
            votes[label] += math.exp(cosine / 0.07)
        order = [label for label, _ in votes.most_common(5)]
        top1 += order[0] == labels[i]
        top5 += labels[i] in order
    assert found == {
        "knn_top1": 100 * top1 / len(queries),
        "knn_top5": 100 * top5 / len(queries),
    }


def test_the_linear_classifier_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4  # every second image has an even class
    features = torch.randn(120, 16, generator=generator)
    features[torch.arange(120), labels] += 2  # the neighbours predict it often, but not always
    found = linear_scores(features, labels, 4)
    inside = torch.arange(120) // 4  # position of an image among those of its class
    right = 0
    for tested in (0, 1):
        own = inside % 2 == tested
        scaler = StandardScaler().fit(features[~own].numpy())
        ridge = Ridge(alpha=0.01 * int((~own).sum()))
        ridge.fit(scaler.transform(features[~own].numpy()), torch.eye(4)[labels[~own]].numpy())
        guessed = ridge.predict(scaler.transform(features[own].numpy())).argmax(axis=1)
        right += int((guessed == labels[own].numpy()).sum())
    assert found == {"linear_top1": 100 * right / 120, "linear_top5": 100}
    assert 50 < found["linear_top1"] < 100
    constant = linear_scores(torch.ones(5, 3), torch.tensor([0, 0, 1, 2, 2]), 3)
    assert 0 <= constant["linear_top1"] <= 60
