"""Images of 24,000 x 24,000 pixels in small files are refused by their header on every path."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_shards import make_shards
from PIL import Image
from test_images import bomb

from mae_scale.data.annotated_transforms import DetectionTransform, SegmentationTransform
from mae_scale.data.augment import Augment
from mae_scale.data.bands import raw_values
from mae_scale.data.images_dataset import ShardDataset
from mae_scale.data.loader import EvalLoader
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import TRAIN_UNIFORMS, decode_image
from mae_scale.errors import UserError
from mae_scale.inference.images import read_centre
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.images import decode_error, shrink
from mae_scale.sharding.verify import verify
from mae_scale.watching.report import picture

PIXELS = r"576,000,000 pixels|more than [\d,]+ pixels"
KEYS = (0, 0, 0)
EMPTY = bytearray(json.dumps({"annotations": []}).encode())


@pytest.fixture(autouse=True)
def takes_no_memory() -> Iterator[None]:
    """Check that memory does not grow; the pixels would take 0.6 to 1.7 GB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _highest()
    yield
    assert _highest() - before < 300e6


def _highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def small(kind: str) -> bytearray:
    stream = io.BytesIO()
    Image.new("L", (64, 64)).save(stream, kind)
    return bytearray(stream.getvalue())


DECODERS: dict[str, Callable[[bytearray], object]] = {
    "evaluation, predictions": decode_image,
    "sharding": lambda data: shrink(bytes(data), 32, 90),
    "training": lambda data: Augment()(data, 32, [np.full(TRAIN_UNIFORMS, 0.5)], [KEYS]),
    "colours": lambda data: Augment(crop="none")(data, 32, [np.zeros(TRAIN_UNIFORMS)], [KEYS]),
    "detection": lambda data: DetectionTransform([{"id": 1}])(data, EMPTY, 32, KEYS),
    "segmentation": lambda data: SegmentationTransform()(data, small("PNG"), 32, KEYS),
    "mask": lambda data: SegmentationTransform()(small("JPEG"), data, 32, KEYS),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("where", DECODERS)
def test_decoders(where: str, kind: str) -> None:
    with pytest.raises(ValueError, match=PIXELS) as refusal:
        DECODERS[where](bytearray(bomb(kind)))
    assert "\n" not in str(refusal.value)


def test_shards(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "train", [bytes(small("JPEG")), bomb("JPEG")], [2])
    with pytest.raises(UserError, match=PIXELS):
        list(EvalLoader(open_shards(folder), img_size=32, batch_size=2))
    with pytest.raises(ValueError, match=PIXELS):
        ShardDataset(folder)[1]
    assert any("pixels" in problem for problem in verify(folder).problems)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    index_shards([str(folder)])
    assert len(open_shards(folder)) == 1  # the other image is left out


def test_shards_that_allow_more_pixels_are_intact_but_not_decoded(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "train", [bytes(small("JPEG")), bomb("JPEG")], [2])
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.setdefault("made_by", {}).setdefault("plan", {})["max_pixels"] = 576_000_000
    path.write_text(json.dumps(manifest))
    assert not any("pixels" in problem for problem in verify(folder).problems)
    assert any("pixels" in problem for problem in verify(folder, max_pixels=10**8).problems)


def test_pictures(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(bomb("JPEG"))
    with pytest.raises(UserError, match=PIXELS):
        read_centre(path, 32, 10**8)
    assert picture(path) is None


def test_only_named_formats_are_opened() -> None:
    """PIL would give PostScript to Ghostscript, which runs it."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    for where in ("evaluation, predictions", "sharding", "training"):
        with pytest.raises(Exception, match=r"not a JPEG, PNG, WEBP, .* or JPEG2000 image"):
            DECODERS[where](bytearray(stream.getvalue()))
    assert str(decode_error(stream.getvalue())).startswith("not a JPEG, PNG")


def test_decoders_that_copy_may_decode_a_quarter() -> None:
    stream = io.BytesIO()
    Image.new("L", (2000, 2000)).save(stream, "WEBP")
    assert decode_image(stream.getvalue(), 16_000_000).shape == (3, 2000, 2000)
    with pytest.raises(ValueError, match="4,000,000 pixels, more than 3,750,000"):
        decode_image(stream.getvalue(), 15_000_000)


def test_pages_that_share_their_bytes() -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as tiff:
        for _ in range(60):
            tiff.write(np.zeros((4000, 4000), np.uint8), compression="zlib", metadata=None)
    with pytest.raises(ValueError, match="960,000,000 bytes decoded"):
        raw_values(stream.getvalue(), 60)
