"""What counts as damaged: what PIL cannot decode, found without decoding sound JPEGs."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from PIL import Image

from mae_scale.sharding.images import damage, decode_error, shrink


@pytest.fixture(scope="module")
def photos(imagenet_tree: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[::5]]


def encoded(photo: bytes, mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def test_sound_photographs_pass(photos: list[bytes]) -> None:
    assert [damage(photo) for photo in photos] == [None] * len(photos)


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
    assert damage(encoded(photos[0], mode, kind, **options)) is None


def test_trailing_bytes_and_a_missing_end_are_left_to_pil(photos: list[bytes]) -> None:
    assert damage(photos[0] + b"after the end") is None
    for cut in (2, 20):
        assert (damage(photos[0][:-cut]) is None) == (decode_error(photos[0][:-cut]) is None)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_truncated_images_are_damaged(photos: list[bytes], part: float) -> None:
    for photo in photos[:10]:
        assert damage(photo[: int(len(photo) * part)])
        png = encoded(photo, "L", "PNG")
        assert damage(png[: int(len(png) * part)])


def test_other_files_are_damaged() -> None:
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"<html>no image</html>", bytes(5000)):
        assert damage(data)


def spoiled(data: bytes, dice: random.Random) -> bytes:
    """An image after a fault of a disk or a transfer, half of the time in its headers."""
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
            assert (damage(data) is None) == decodes
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
