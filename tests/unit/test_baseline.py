"""Progressive JPEGs become baseline in sharding, with equal pixels; other images stay as they
are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_scale.cli import main
from mae_scale.data.shards import open_shards, read_manifest
from mae_scale.data.transforms import decode_image
from mae_scale.sharding.baseline import is_progressive, make_baseline
from mae_scale.sharding.verify import verify


def encoded(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photo(imagenet_tree: Path) -> Image.Image:
    path = min(imagenet_tree.glob("*/*"), key=lambda p: p.stat().st_size)
    return Image.open(path).convert("RGB")


@pytest.mark.parametrize(
    ("mode", "size", "options"),
    [
        ("RGB", None, {}),
        ("RGB", None, {"subsampling": 0}),
        ("RGB", None, {"subsampling": 1, "icc_profile": b"x" * 3000}),
        ("RGB", None, {"keep_rgb": True}),
        ("RGB", (17, 33), {"restart_marker_rows": 1}),
        ("RGB", (1, 1), {}),
        ("L", None, {}),
        ("CMYK", None, {}),
    ],
)
def test_pixels_stay(
    photo: Image.Image, mode: str, size: tuple[int, int] | None, options: dict
) -> None:
    image = (photo.resize(size) if size else photo).convert(mode)
    data = encoded(image, progressive=True, quality=88, **options)
    made = make_baseline(data)
    assert is_progressive(data) and made is not None and not is_progressive(made)
    before, after = (decode_image(d) for d in (data, made))
    assert np.array_equal(np.asarray(before), np.asarray(after))


def test_damage_is_no_matter_of_the_scans(photo: Image.Image) -> None:
    data = encoded(photo, progressive=True)
    with pytest.raises(OSError, match="truncated"):
        make_baseline(data[: len(data) // 2])
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 255
    made = make_baseline(bytes(spoilt))
    assert made is None or np.array_equal(
        np.asarray(Image.open(io.BytesIO(made))), np.asarray(Image.open(io.BytesIO(spoilt)))
    )


def test_shards_of_baseline_images(
    photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "a/1.jpg": encoded(photo, progressive=True),
        "a/2.jpg": encoded(photo),
        "b/3.jpg": encoded(photo.convert("L"), progressive=True),
        "b/4.jpg": encoded(photo, progressive=True)[:-900],
    }
    for name, data in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    out = tmp_path / "out"
    command = ["shard", str(tmp_path / "src"), str(out), "--split", "train"]
    assert main([*command, "--baseline"]) == 0
    assert "2 progressive JPEGs were made baseline\n" in capsys.readouterr().out
    made_by = read_manifest(out)["made_by"]
    assert made_by["baseline"] == 2 and [name for name, _ in made_by["damaged"]] == ["b/4.jpg"]
    assert verify(out).problems == []
    tar = (out / "train-000000.tar").read_bytes()
    index = open_shards(out).index
    images = [tar[e["offset"] : e["offset"] + e["size"]] for e in index]
    assert files["a/2.jpg"] in images and not any(map(is_progressive, images))
    assert main([*command, "--baseline"]) == 0  # sharding is finished
    assert main(command) == 2  # other options
