"""Contact sheets of shards: which samples they show, and that any text can stand under them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_scale.data.bands import Bands
from mae_scale.data.preview import CLASSES, PER_CLASS, chosen, draw, preview
from mae_scale.tasks.first_batch import FirstBatch


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


def test_the_first_batch_is_drawn_once_and_never_ends_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A random number that is drawn afterwards is the same as without the picture."""
    images, mixed = torch.randn(4, 3, 8, 8), torch.tensor([[0.02, 0.7, 0.28]] * 4)
    first = FirstBatch(tmp_path / "first.png", Bands(), ["a", "b", "c"])
    assert first._lines(mixed[0]) == ["class 1: 0.70", "b", "class 2: 0.28", "c"]
    assert first._lines(torch.tensor([0.1, 0.9, 0.1])) == ["class 1: 0.90", "b"]
    before = torch.get_rng_state()
    for step, micro in ((1, 0), (0, 1)):
        first.draw(step, micro, images, mixed)
    assert not first.path.exists()
    first.draw(0, 0, images, torch.full((4,), -1), torch.ones(4, 4), (2, 2))
    assert first.path.exists() and torch.equal(before, torch.get_rng_state())
    FirstBatch(tmp_path / "no" / "f.png", Bands(), []).draw(0, 0, images, torch.full((4,), -1))
    assert "is not drawn" in caplog.text
