"""Pixels equal those that PIL decodes, and crops are distributed as torchvision's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from simplejpeg import encode_jpeg
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from mae_scale.data.formats import jpeg_frame
from mae_scale.data.transforms import (
    TRAIN_UNIFORMS,
    Scratch,
    _decode_rows,
    crop_box,
    decode_image,
    decode_train_crops,
    denormalize,
    eval_crop,
    normalize,
    train_crop,
)
from mae_scale.randomness import Purpose, uniform


def uniforms(sample: int, epoch: int = 0) -> np.ndarray:
    return uniform(Purpose.AUGMENT, 0, epoch, sample, np.arange(TRAIN_UNIFORMS))


def pil_pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def as_hwc(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photographs(imagenet_tree: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*.JPEG"))]


def test_real_photographs_decode_as_pil_does(photographs: list[bytes]) -> None:
    modes = set()
    for data in photographs[::3]:  # every third meets both modes
        modes.add(Image.open(io.BytesIO(data)).mode)
        assert np.array_equal(as_hwc(decode_image(data)), pil_pixels(data))
    assert modes == {"RGB", "L"}


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def without_adobe_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


ODD = {
    "CMYK with Adobe's inversion": lambda im: encode(im.convert("CMYK"), "JPEG"),
    "CMYK without": lambda im: without_adobe_marker(encode(im.convert("CMYK"), "JPEG")),
    "gray": lambda im: encode(im.convert("L"), "JPEG"),
    "progressive": lambda im: encode(im, "JPEG", progressive=True),
    "RGB in the file": lambda im: encode(im, "JPEG", keep_rgb=True),
    "no chroma subsampling": lambda im: encode(im, "JPEG", subsampling=0),
    "4:2:2": lambda im: encode(im, "JPEG", subsampling=1),
    "4:1:1": lambda im: encode(im, "JPEG", subsampling="4:1:1"),
    "broken EXIF": lambda im: encode(im, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken"),
    "EXIF orientation": lambda im: encode(im, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"
                                          b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "bytes after the end": lambda im: encode(im, "JPEG") + b"x" * 99,
    "PNG": lambda im: encode(im, "PNG"),
    "16-bit PNG": lambda im: encode(
        Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257), "PNG"
    ),
    "palette with transparency": lambda im: encode(im.convert("P"), "PNG", transparency=3),
    "gray with alpha": lambda im: encode(im.convert("LA"), "PNG"),
    "WebP": lambda im: encode(im, "WEBP"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "16-bit PNG"])
def test_odd_files_decode_as_pil_does(kind: str, photographs: list[bytes]) -> None:
    """Images of 16 bits are scaled, other than by PIL (see test_images)."""
    data = ODD[kind](Image.open(io.BytesIO(photographs[3])))
    assert np.array_equal(as_hwc(decode_image(data)), pil_pixels(data))


@pytest.mark.parametrize("kind", ODD)
def test_a_crop_decoded_in_part_has_the_pixels_of_the_whole(
    kind: str, photographs: list[bytes]
) -> None:
    data = ODD[kind](Image.open(io.BytesIO(photographs[6])))
    scratch = Scratch()
    for i in range(40):
        kept = bytearray(data)
        got = decode_train_crops(kept, 64, [uniforms(i)], scratch)[0]
        assert torch.equal(got, train_crop(decode_image(data), 64, uniforms(i)))
        assert kept == data


def test_photographs_decoded_in_part_have_the_pixels_of_the_whole(
    photographs: list[bytes],
) -> None:
    scratch = Scratch()
    for i, data in enumerate(photographs[1::2]):
        got = decode_train_crops(bytearray(data), 224, [uniforms(i)], scratch)[0]
        assert torch.equal(got, train_crop(decode_image(data), 224, uniforms(i)))


def test_the_last_row_of_a_crop_is_decoded_with_its_colours(photographs: list[bytes]) -> None:
    """Every bottom edge is tried at each chroma subsampling, with crops of whole rows."""
    image = Image.open(io.BytesIO(photographs[6])).convert("RGB").resize((48, 64))
    for subsampling in ("444", "422", "420", "411", "440"):
        data = encode_jpeg(np.array(image), colorsubsampling=subsampling)
        whole = decode_image(data)
        frame = jpeg_frame(data)
        assert frame is not None
        for rows in range(1, 65):
            part = _decode_rows(bytearray(data), frame, rows, Scratch())
            assert part.shape[1] <= rows + 2
            assert torch.equal(part[:, :rows], whole[:, :rows])


@pytest.mark.parametrize("damage", ["cut", "cut near the end", "empty", "zeros", "text", "PNG cut"])
def test_damaged_files_are_refused(damage: str, photographs: list[bytes]) -> None:
    data = photographs[3]
    png = encode(Image.open(io.BytesIO(data)), "PNG")
    bad = {
        "cut": data[: len(data) // 2],
        "cut near the end": data[:-10],
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"<html>404</html>",
        "PNG cut": png[: len(png) // 2],
    }[damage]
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(bad)
    for i in range(10):  # wherever the crop lies
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_train_crops(bytearray(bad), 64, [uniforms(i)], Scratch())[0]


SIZES = [(375, 500), (500, 333), (224, 224), (100, 900), (900, 60), (8, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    n, ratio = 4000, (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    ours = np.array([crop_box(height, width, uniforms(i), scale) for i in range(n)])
    top, left, h, w = ours.T
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    for name, of in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "bottom": lambda box: box[:, 0] + box[:, 2],
        "right": lambda box: box[:, 1] + box[:, 3],
    }.items():
        assert ks_2samp(of(ours), of(theirs)).pvalue > 1e-3, name


def test_boxes_do_not_depend_on_each_other() -> None:
    """The place of a box is independent of its size and of the next sample's box."""
    boxes = np.array([crop_box(400, 400, uniforms(i)) for i in range(5000)], float)
    place = boxes[:, 0] / np.maximum(400 - boxes[:, 2], 1)
    assert abs(np.corrcoef(place, boxes[:, 2])[0, 1]) < 0.05
    assert abs(np.corrcoef(boxes[1:, 2], boxes[:-1, 2])[0, 1]) < 0.05


def test_train_crops_are_within_a_grey_level_of_pil(photographs: list[bytes]) -> None:
    differences, flips = [], 0
    for i, data in enumerate(photographs[::3]):
        u = uniforms(i)
        got = as_hwc(train_crop(decode_image(data), 224, u)).astype(int)
        image = Image.fromarray(pil_pixels(data))
        top, left, h, w = crop_box(image.height, image.width, u)
        expected = image.crop((left, top, left + w, top + h)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        if u[-1] < 0.5:
            flips += 1
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        differences.append(np.abs(got - np.asarray(expected, int)).mean())
    assert max(differences) < 1.0
    assert np.mean(differences) < 0.25
    assert 0.3 < flips / len(differences) < 0.7


def test_a_crop_follows_from_its_uniforms_alone(photographs: list[bytes]) -> None:
    image = decode_image(photographs[0])
    u = uniforms(5)
    first = train_crop(image, 96, u)
    assert first.shape == (3, 96, 96)
    train_crop(image, 96, uniforms(6))
    assert torch.equal(first, train_crop(image, 96, u))
    flipped = u.copy()
    flipped[-1] = (flipped[-1] + 0.5) % 1
    assert torch.equal(train_crop(image, 96, flipped), first.flip(-1))
    assert torch.equal(train_crop(image, 96, u, hflip=False), train_crop(
        image, 96, np.append(u[:-1], 0.9)
    ))  # fmt: skip


@pytest.mark.parametrize(("size", "crop_ratio"), [(224, 0.875), (96, 0.875), (448, 1.0)])
def test_eval_crops_are_those_of_the_official_evaluation(
    size: int, crop_ratio: float, photographs: list[bytes]
) -> None:
    resize = Resize(int(size / crop_ratio), interpolation=InterpolationMode.BICUBIC)
    for data in photographs[::25]:
        got = as_hwc(eval_crop(decode_image(data), size, crop_ratio)).astype(int)
        expected = CenterCrop(size)(resize(Image.fromarray(pil_pixels(data))))
        assert got.shape == (size, size, 3)
        assert np.abs(got - np.asarray(expected, int)).mean() < 1.0


def test_normalize_is_the_official_one_and_turns_back(photographs: list[bytes]) -> None:
    from torchvision.transforms.functional import normalize as reference

    image = eval_crop(decode_image(photographs[0]), 64)
    batch = torch.stack([image, image.flip(-1)])
    got = normalize(batch)
    expected = reference(batch / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denormalize(got), batch / 255, rtol=1e-6, atol=1e-6)


def test_clipped_boxes_are_those_of_the_authors_probe() -> None:
    """The first draw is clipped to the image: 0.518 of a 500 x 375 image on average, not 0.432."""
    generator = np.random.default_rng(0)
    draws = generator.random((20000, TRAIN_UNIFORMS))
    boxes = [crop_box(375, 500, u, (0.08, 1.0), clips=True) for u in draws]
    areas = np.array([h * w for _, _, h, w in boxes]) / (375 * 500)
    assert areas.mean() == pytest.approx(0.518, abs=0.006)
    area = 375 * 500 * (0.08 + 0.92 * draws[:, 0])
    aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * draws[:, 10])
    widths = np.minimum(np.round(np.sqrt(area * aspect)), 500)
    heights = np.minimum(np.round(np.sqrt(area / aspect)), 375)
    assert [(h, w) for _, _, h, w in boxes] == list(zip(heights, widths, strict=True))
    for top, left, height, width in boxes:
        assert 0 <= top <= 375 - height and 0 <= left <= 500 - width
