"""Damaged images are those that PIL cannot decode; sound JPEGs are recognised without decoding."""

from __future__ import annotations

import io
import random
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_scale.data.transforms import decode_image, eval_crop
from mae_scale.sharding.images import decode_error, image_damage, shrink


@pytest.fixture(scope="module")
def photos(imagenet_tree: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[::5]]


def encoded(photo: bytes, mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def test_sound_photographs_pass(photos: list[bytes]) -> None:
    assert [image_damage(photo) for photo in photos] == [None] * len(photos)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("CMYK", "JPEG", {}),
        ("L", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "optimize": True}),
        ("RGB", "JPEG", {"restart_marker_blocks": 8}),
        ("RGB", "JPEG", {"exif": b"Exif\0\0MM\0*broken broken broken"}),
        ("RGB", "JPEG", {"subsampling": 0}),
    ],
)
def test_unusual_images_pass(photos: list[bytes], mode: str, kind: str, options: dict) -> None:
    assert image_damage(encoded(photos[0], mode, kind, **options)) is None


def test_trailing_bytes_and_a_missing_end_are_left_to_pil(photos: list[bytes]) -> None:
    assert image_damage(photos[0] + b"after the end") is None
    for cut in (2, 20):
        assert (image_damage(photos[0][:-cut]) is None) == (decode_error(photos[0][:-cut]) is None)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_truncated_images_are_damaged(photos: list[bytes], part: float) -> None:
    for photo in photos[:10]:
        assert image_damage(photo[: int(len(photo) * part)])
        png = encoded(photo, "L", "PNG")
        assert image_damage(png[: int(len(png) * part)])


def test_other_files_are_damaged() -> None:
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"<html>no image</html>", bytes(5000)):
        assert image_damage(data)


def spoiled(data: bytes, dice: random.Random) -> bytes:
    """Damage an image as a disk or a transfer may, half of the time in its headers."""
    spoilt = bytearray(data)
    start = dice.randrange(dice.choice([700, len(data)]))
    length = dice.choice([1, 1, 10, 512, 4096])
    how = dice.randrange(4)
    if how == 0:
        del spoilt[start : start + length]
    elif how == 1:
        spoilt[start : start + length] = bytes(len(spoilt[start : start + length]))
    else:
        for _ in range(how):
            spoilt[dice.randrange(start + 1)] = dice.randrange(256)
    return bytes(spoilt)


def test_the_quick_check_agrees_with_decoding(photos: list[bytes]) -> None:
    dice = random.Random(0)
    progressive = [encoded(p, "RGB", "JPEG", progressive=True) for p in photos[:10]]
    seen = {True: 0, False: 0}
    for photo in [*photos, *photos, *progressive, *progressive, *progressive]:
        for data in (spoiled(photo, dice) for _ in range(4)):
            decodes = decode_error(data) is None
            assert (image_damage(data) is None) == decodes
            seen[decodes] += 1
    assert min(seen.values()) > 50  # both kinds were tried


def test_shrinking(photos: list[bytes]) -> None:
    for photo in photos[:10]:
        width, height = Image.open(io.BytesIO(photo)).size
        small = Image.open(io.BytesIO(shrink(photo, 64, 90)))
        assert small.format == "JPEG" and small.mode == "RGB"
        assert min(small.size) == 64
        assert abs(small.size[0] / small.size[1] - width / height) < 0.03 * width / height
        assert shrink(photo, min(width, height), 90) == photo
    with pytest.raises(OSError):
        shrink(photos[0][:5000], 64, 90)


def bomb(kind: str) -> bytes:
    """Make a small file whose header claims 24,000 x 24,000 pixels."""
    stream = io.BytesIO()
    Image.new("L", (64, 64)).save(stream, kind)
    data = bytearray(stream.getvalue())
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = (24_000).to_bytes(2, "big") * 2
    elif kind == "PNG":
        data[16:24] = (24_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        data[18:26] = (24_000).to_bytes(4, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind: str) -> None:
    data = bomb(kind)
    tracemalloc.start()
    assert "pixels, more than 178,956,970" in str(image_damage(data)) or "more than" in str(
        image_damage(data)
    )
    with pytest.raises(ValueError, match="pixels"):
        decode_image(data)
    with pytest.raises(ValueError, match="pixels"):
        shrink(data, 32, 90)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_and_not_clipped(mode: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint32).reshape(64, 64)
    stream = io.BytesIO()
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    Image.frombytes(mode, (64, 64), values.astype(kind).tobytes()).save(stream, "TIFF")
    pixels = decode_image(stream.getvalue()).numpy()
    assert np.abs(pixels - values / 257).max() <= 0.5
    assert image_damage(stream.getvalue()) is None


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (0.0, 40_000.5), (float("nan"), 2.0)])
def test_floats_of_unknown_range_are_named(values: tuple[float, float]) -> None:
    stream = io.BytesIO()
    floats = np.full((8, 8), values[0], np.float32)
    floats[0] = values[1]
    Image.fromarray(floats).save(stream, "TIFF")
    assert "nobody can say what is white" in str(image_damage(stream.getvalue()))


def test_a_line_of_pixels_takes_no_memory() -> None:
    line = torch.zeros((3, 1, 20_000), dtype=torch.uint8)
    assert eval_crop(line, 224).shape == (3, 224, 224)
    assert eval_crop(line.transpose(1, 2), 224).shape == (3, 224, 224)
