"""Random changes of the images for detectors and segmenters, and their resizing and padding.

Everything random follows from (seed, epoch, sample), as for classification.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import interpolate

from mae_scale.data.annotations import (
    IGNORE,
    box_within,
    objects_of,
    read_label_map,
    read_record,
    shape_mask,
)
from mae_scale.data.dataset import empty_images
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.transforms import decode_image, normalize
from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, uniform

Targets = dict[str, npt.NDArray[Any]]  # arrays of one image; a batch concatenates their first axes

_PAD_GREY = 128
_MIN_EXTENT = 1e-5  # pixels; a box with no larger part in the crop is left out


class Transform(Protocol):
    """Function that makes pixels and targets from the two files of a sample."""

    def __call__(
        self,
        data: bytearray,
        annotation: bytearray,
        size: int,
        keys: tuple[int, int, int],
        max_pixels: int = MAX_PIXELS,
    ) -> tuple[torch.Tensor, Targets]:
        """Return pixels, uint8 [3, size, size], and the targets of this image.

        Args:
            data, annotation: contents of the image file and of the annotation file.
            size: pixels of a side of the result.
            keys: seed, epoch and sample.
            max_pixels: a larger image is refused before it is decoded.

        Raises:
            ValueError: one of the files is damaged, or too large.
        """
        ...


class DetectionTransform:
    """Large-scale jitter of both published recipes: resize, crop or pad to the size, flip.

    Args:
        categories: categories as the COCO file lists them; classes are numbered in the order of
            their ids.
        recipe: "li2021" resizes, crops, pads right and bottom with grey (128) and then flips;
            "vitdet" flips first and leaves the padding to come after normalisation.
        scale: smallest and largest ratio of the resized image's size to that of the crop.
    """

    def __init__(
        self,
        categories: Any,
        recipe: Literal["li2021", "vitdet"] = "vitdet",
        scale: tuple[float, float] = (0.1, 2.0),
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale {list(scale)} must be two numbers above 0, the smaller first")
        self._class_of = class_numbers(categories)
        self._recipe, self._scale = recipe, scale

    def __call__(
        self,
        data: bytearray,
        annotation: bytearray,
        size: int,
        keys: tuple[int, int, int],
        max_pixels: int = MAX_PIXELS,
    ) -> tuple[torch.Tensor, Targets]:
        """Make pixels and targets, see `Transform`."""
        scale, place, flip = uniform(Purpose.ANNOTATED_AUGMENT, *keys, np.arange(3)).tolist()
        image = decode_image(data, max_pixels)
        height, width = image.shape[1:]
        objects = objects_of(read_record(annotation), height, width)
        low, high = self._scale
        ratio = size * (low + (high - low) * scale) / max(height, width)
        new_h, new_w = max(1, round(height * ratio)), max(1, round(width * ratio))
        flips, first = flip < 0.5, self._recipe == "vitdet"
        # One random number serves both axes, as in Detectron2.
        top, left = (round(place * max(0, n - size)) for n in (new_h, new_w))
        h, w = min(size, new_h), min(size, new_w)

        if flips and first:
            image = image.flip(-1)
        canvas = padded(resize_smooth(image, new_h, new_w)[:, top : top + h, left : left + w], size)
        if flips and not first:
            canvas = canvas.flip(-1)

        def moved(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            """Move coordinates [k, 2] from the file to the crop, before a flip at the end."""
            if flips and first:
                x = np.stack([width - x[:, 0], x[:, 1]], axis=1)
            return x * (new_w / width, new_h / height) - (left, top)

        kept, boxes, masks = [], [], []
        for number, shape in enumerate(objects.shapes):
            if isinstance(shape, dict):
                whole = shape_mask(shape, height, width)
                if flips and first:
                    whole = whole[:, ::-1]
                rows = ((np.arange(top, top + h) + 0.5) * height / new_h).astype(int)
                columns = ((np.arange(left, left + w) + 0.5) * width / new_w).astype(int)
                part = whole[np.ix_(rows, columns)]
                box = _extent(part)
            else:
                polygons = [moved(np.asarray(p, np.float64).reshape(-1, 2)) for p in shape]
                box = box_within(polygons, 0, 0, w, h)
                if box is not None and flips and not first:
                    polygons = [np.stack([size - p[:, 0], p[:, 1]], axis=1) for p in polygons]
            if box is None or min(box[2] - box[0], box[3] - box[1]) <= _MIN_EXTENT:
                continue
            mask = np.zeros((size, size), np.uint8)
            ends = slice(size - w, size) if flips and not first else slice(0, w)
            if isinstance(shape, dict):
                mask[:h, ends] = part[:, ::-1] if flips and not first else part
            else:
                drawn = shape_mask([p.ravel().tolist() for p in polygons], size, size)
                mask[:h, ends] = drawn[:h, ends]
            if flips and not first:
                box = (size - box[2], box[1], size - box[0], box[3])
            kept.append(number)
            boxes.append(box)
            masks.append(np.packbits(mask, axis=1))
        shown = (size, size) if not first else (h, w)
        return canvas, {
            "size": np.array([shown], np.int64),
            "objects": np.array([len(kept)], np.int64),
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "classes": self._class_of(objects.categories[kept]),
            "masks": np.array(masks, np.uint8).reshape(-1, size, -(-size // 8)),
        }


class SegmentationTransform:
    """ADE20K's recipe: resize, crop without a dominating class, flip, change colours, pad.

    Args:
        scale: smallest and largest factor f; the resized image has a short side of at most
            f * size and a long side of at most 4 * f * size pixels.
        most_of_one: largest share of the labelled pixels that one class may have; a crop in which
            one class has more is drawn again, up to ten times.
        colors: whether brightness, contrast, saturation and hue change.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 2.0),
        most_of_one: float = 0.75,
        colors: bool = True,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale {list(scale)} must be two numbers above 0, the smaller first")
        if not 0 < most_of_one <= 1:
            raise UserError(f"most_of_one {most_of_one} must be above 0 and at most 1")
        self._scale, self._most_of_one, self._colors = scale, most_of_one, colors

    def __call__(
        self,
        data: bytearray,
        annotation: bytearray,
        size: int,
        keys: tuple[int, int, int],
        max_pixels: int = MAX_PIXELS,
    ) -> tuple[torch.Tensor, Targets]:
        """Make pixels and targets, see `Transform`."""
        u = uniform(Purpose.ANNOTATED_AUGMENT, *keys, np.arange(2 + 2 * 11 + 9)).tolist()
        image, labels = decode_pair(data, annotation, max_pixels)
        low, high = self._scale
        short = size * (low + (high - low) * u[0])
        new_h, new_w = scaled_size(labels.shape[0], labels.shape[1], short)
        image = resize_plain(image, new_h, new_w)
        labels = _nearest(labels, new_h, new_w)
        h, w = min(size, new_h), min(size, new_w)
        for attempt in range(11):
            y, x = u[2 + 2 * attempt : 4 + 2 * attempt]
            top, left = int(y * (new_h - h + 1)), int(x * (new_w - w + 1))
            crop = labels[top : top + h, left : left + w]
            counts = np.bincount(crop.ravel(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self._most_of_one * counts.sum():
                break
        image = image[:, top : top + h, left : left + w]
        if u[1] < 0.5:
            image, crop = image.flip(-1), crop[:, ::-1]
        if self._colors:
            image = change_colors(image, u[24:])
        target = np.full((1, size, size), IGNORE, np.uint8)
        target[0, :h, :w] = crop
        return padded(image, size), {"size": np.array([[h, w]]), "segmentation": target}


def class_numbers(categories: Any) -> Any:
    """Return a function from category ids, int64 [n], to classes from 0 in the order of the ids."""
    ids = np.sort(np.array([category["id"] for category in categories], np.int64))

    def numbers(found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        places = np.searchsorted(ids, found).clip(max=len(ids) - 1)
        if (unknown := found[ids[places] != found]).size:
            raise ValueError(f"has an object of the category {unknown[0]}, which is not listed")
        return np.asarray(places, np.int64)

    return numbers


def decode_pair(
    data: bytearray, annotation: bytearray, max_pixels: int = MAX_PIXELS
) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """Decode an image, uint8 [3, H, W], and its classes from 0, uint8 [H, W], `IGNORE` for none.

    Args:
        max_pixels: a larger image is refused before it is decoded.

    Raises:
        ValueError: one of the files is damaged or too large, or they have different sizes.
    """
    image, values = decode_image(data, max_pixels), read_label_map(annotation, max_pixels)
    if image.shape[1:] != values.shape:
        raise ValueError(
            f"has {tuple(image.shape[1:])} pixels, its mask {values.shape} (height, width)"
        )
    return image, np.where(values == IGNORE, IGNORE, values - np.uint8(1))  # 0 becomes 255


def scaled_size(height: int, width: int, short: float) -> tuple[int, int]:
    """Scale a size: the short side to at most `short`, the long one to at most 4 * `short`.

    The aspect ratio is kept; rounding is that of mmcv.
    """
    ratio = min(4 * short / max(height, width), short / min(height, width))
    return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))


def change_colors(image: torch.Tensor, u: list[float]) -> torch.Tensor:
    """Apply the photometric distortion of ADE20K's recipe; each change has a probability of 1/2.

    Brightness changes by up to 32 of 255, contrast and saturation by factors of 0.5 to 1.5, hue by
    up to 18 of 180 (36 degrees). Contrast comes before or after saturation and hue.

    Args:
        image: uint8 [3, H, W].
        u: nine uniforms in [0, 1): four decide which changes happen, four how large they are, one
            the order.
    """
    brightness, contrast, saturation, hue = (value < 0.5 for value in u[:4])
    pixels = image.permute(1, 2, 0).numpy()

    def changed(x: npt.NDArray[Any], factor: float = 1.0, shift: float = 0.0) -> npt.NDArray[Any]:
        return np.clip(x.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    if brightness:
        pixels = changed(pixels, shift=-32 + 64 * u[4])
    if contrast and u[8] < 0.5:
        pixels = changed(pixels, 0.5 + u[5])
    if saturation or hue:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if saturation:
            hsv[..., 1] = changed(hsv[..., 1], 0.5 + u[6])
        if hue:  # PIL divides the circle of hues into 256, the recipe into 180
            turn = round((int(u[7] * 37) - 18) * 256 / 180)
            hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % 256
        pixels = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if contrast and u[8] >= 0.5:
        pixels = changed(pixels, 0.5 + u[5])
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def padded(image: torch.Tensor, size: int) -> torch.Tensor:
    """Put uint8 [3, h, w] into the upper left corner of a grey square [3, size, size]."""
    canvas = empty_images(1, size)[0].fill_(_PAD_GREY)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def normalize_padded(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 [b, 3, S, S] to float32, with 0 outside of `sizes` [b, 2] (height, width)."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows < sizes[:, :1])[:, None, :, None] & (columns < sizes[:, 1:])[:, None, None, :]
    return normalize(images) * inside


def unpack_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Unpack masks uint8 [n, S, ceil(S / 8)] to bool [n, S, S], on the same device."""
    bits = torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    found = (masks[..., None] >> bits) & 1
    return found.flatten(2)[..., :size].bool()


def resize_smooth(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [3, H, W] bilinearly with antialiasing, as PIL does."""
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def resize_plain(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [3, H, W] bilinearly without antialiasing, as OpenCV does, and round."""
    found = interpolate(image[None].float(), (height, width), mode="bilinear")[0]
    return found.round_().to(torch.uint8)


def _nearest(labels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    rows = np.minimum(np.arange(height) * labels.shape[0] // height, labels.shape[0] - 1)
    columns = np.minimum(np.arange(width) * labels.shape[1] // width, labels.shape[1] - 1)
    return labels[np.ix_(rows, columns)]


def _extent(mask: npt.NDArray[np.uint8]) -> tuple[float, float, float, float] | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def evaluated_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Scale height and width so that the long side is `size`, rounded as in Detectron2."""
    ratio = size / max(height, width)
    return max(1, math.floor(height * ratio + 0.5)), max(1, math.floor(width * ratio + 0.5))


def evaluation_input(image: torch.Tensor, size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Resize and pad an image for the evaluation of a detector.

    Args:
        image: uint8 [3, H, W].
        size: pixels of the resized long side; the short side is padded to it.

    Returns:
        The image uint8 [3, size, size], and its height and width without padding.
    """
    h, w = evaluated_size(image.shape[1], image.shape[2], size)
    return padded(resize_smooth(image, h, w), size), (h, w)
