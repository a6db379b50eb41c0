"""Contact sheets of shards: which samples they show, and that any text can stand under them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mae_scale.data.preview import CLASSES, PER_CLASS, chosen, draw, preview


def test_a_few_samples_of_many_classes_are_chosen() -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 50_000)
    places = chosen(labels)
    shown = labels[places]
    assert len(places) == CLASSES * PER_CLASS == len(set(places))
    assert (np.diff(shown) >= 0).all() and {0, 999} <= set(shown.tolist())
    assert chosen(np.array([5, 5, 2], np.int32)) == [2, 0, 1]
    assert chosen(np.full(7, -1)) == list(range(7)) and chosen(np.array([], int)) == []


def test_the_picture_shows_the_pixels_of_the_shards(shards: Path, tmp_path: Path) -> None:
    preview(shards, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 200
    red = torch.zeros(3, 28, 28, dtype=torch.uint8)
    red[0] = 255
    draw([(red, 1, "b"), (255 - red, 0, "a")], tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        pixels = np.asarray(picture).reshape(-1, 3)
    for colour in ([255, 0, 0], [0, 255, 255]):
        assert (pixels == colour).all(axis=1).sum() == 112 * 112


def test_any_text_can_stand_under_an_image(tmp_path: Path) -> None:
    names = [
        "日本語",
        "قطة",
        "🐈",
        "a" * 10_000,
        "two\nlines",
        "\x1b[31m",
        "caf\udce9",
        "",
        "$x^2$",
    ]
    image = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    draw(((image, i, name) for i, name in enumerate(names)), tmp_path / "p.png")
    draw([], tmp_path / "empty.png")
    assert Image.open(io.BytesIO((tmp_path / "p.png").read_bytes())).size[0] < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "p.png"]
