"""Decoding and cropping of images to uint8 pixels of the model's size, and their normalisation.

Pixels stay uint8 until they are on the device: they cause a quarter of the memory traffic of
floats, and uint8 tensors are resized several times as fast. Images are [3, H, W] tensors whose
memory is laid out row, column, channel (`torch.channels_last`), as the JPEG decoder writes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from simplejpeg import decode_jpeg
from torch.nn.functional import interpolate

from mae_scale.config.sizes import ImageSize, sides
from mae_scale.data.formats import (
    MAX_PIXELS,
    Frame,
    TooLarge,
    check_pixels,
    jpeg_frame,
    open_image,
    to_rgb,
)

# Mean and std of each channel, for pixels in [0, 1] (values of the official pipeline).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_RATIO = 0.875  # share of the short side that a crop of fixed size covers
_MAX_ASPECT = 32  # largest aspect ratio when resizing by the short side; longer images are cut
_TRIES = 10  # tries of RandomResizedCrop, before it takes the centre
TRAIN_UNIFORMS = 2 * _TRIES + 3  # area and ratio per try, x, y, flip; for `train_crop`


def decode_image(data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image file to the RGB pixels of PIL's ``convert("RGB")``.

    All images that PIL opens are accepted, whatever their names say: PNG, CMYK or grayscale JPEG,
    broken EXIF. Gray of 16 bits is scaled to 8, see `to_rgb`. The orientation that EXIF asks for is
    not applied (as in the official pipeline).

    Args:
        max_pixels: a larger image is refused by its header, before it takes memory.

    Returns:
        uint8 [3, H, W].

    Raises:
        ValueError: the file is no image, or a damaged one, or one that is too large.
    """
    if _quick_frame(data, max_pixels) is not None:
        try:
            return _from_rows(decode_jpeg(data, strict=False))
        except ValueError:
            pass  # PIL names what is wrong
    try:
        with open_image(data, max_pixels) as image:
            return _from_rows(np.array(to_rgb(image)))
    except TooLarge:
        raise
    except Exception as error:  # PIL passes on all errors of its decoders
        raise ValueError(f"cannot be decoded ({error})") from error


def _from_rows(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _quick_frame(data: bytes | bytearray, max_pixels: int) -> Frame | None:
    """Return the frame header of a whole gray or colour JPEG; None for anything else.

    A file without an end marker is cut off, and so not whole. CMYK is left to PIL, whose conversion
    is the reference.

    Raises:
        TooLarge: the image has too many pixels.
    """
    frame = jpeg_frame(data)
    if frame is None or frame.components not in (1, 3) or not frame.height or not frame.width:
        return None
    check_pixels(frame.width, frame.height, max_pixels)
    return frame if data.rfind(b"\xff\xd9", frame.at) >= 0 else None


def crop_box(
    height: int,
    width: int,
    u: npt.NDArray[np.float64],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    clips: bool = False,
) -> tuple[int, int, int, int]:
    """Make the box of a RandomResizedCrop, distributed as torchvision's, from given uniforms.

    Up to ten times, an area is drawn uniformly in `scale`, as a share of the image's, and an aspect
    ratio log-uniformly in `ratio`; the first box that fits is placed uniformly. If none fits, the
    result is the largest centred box of an allowed ratio.

    Args:
        height, width: size of the image in pixels.
        u: float64 [TRAIN_UNIFORMS] in [0, 1).
        scale: smallest and largest share of the image's area in a crop.
        ratio: smallest and largest width divided by height of a crop.
        clips: whether to take the first box and clip its sides to the image's, as the authors'
            linear probe does. Boxes that do not fit are then kept, so that crops are larger on
            average.

    Returns:
        The box's top, left, height and width, in pixels.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    draws = u.tolist()
    for i in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        aspect = math.exp(log_low + (log_high - log_low) * draws[_TRIES + i])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if clips:
            w, h = min(w, width), min(h, height)
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[2 * _TRIES] * (height - h + 1))
            left = int(draws[2 * _TRIES + 1] * (width - w + 1))
            return top, left, h, w
    if width < ratio[0] * height:
        w, h = width, round(width / ratio[0])
    elif width > ratio[1] * height:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def aspect_of(size: ImageSize) -> tuple[float, float]:
    """Return the smallest and largest aspect ratio of a RandomResizedCrop for a size.

    They are 3/4 to 4/3 of the size's own, so that a crop is stretched no more than for a square.
    """
    height, width = sides(size)
    return 3 / 4 * (width / height), 4 / 3 * (width / height)


def train_crop(
    image: torch.Tensor,
    size: ImageSize,
    u: npt.NDArray[np.float64],
    scale: tuple[float, float] = (0.2, 1.0),
    hflip: bool = True,
    clips: bool = False,
) -> torch.Tensor:
    """Apply RandomResizedCrop (antialiased bicubic) and horizontal flip (paper Appendix A.1).

    Args:
        image: uint8 [C, H, W].
        size: pixels of a side of the result, or its height and width.
        u: float64 [TRAIN_UNIFORMS] in [0, 1); nothing else is random.
        scale: smallest and largest share of the image's area in a crop.
        hflip: whether to flip half of the images.
        clips: as for `crop_box`.

    Returns:
        uint8 [C, height, width].
    """
    box = crop_box(image.shape[1], image.shape[2], u, scale, aspect_of(size), clips)
    return _crop(image, box, size, hflip and u[2 * _TRIES + 2] < 0.5)


class Scratch:
    """Memory for decoding that a caller keeps from image to image.

    Fresh memory for each image would cost a tenth of the time that decoding it takes.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> npt.NDArray[np.uint8]:
        """Return memory of at least `size` bytes, uint8; its earlier content is lost."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)  # aligned, unlike a bytearray
        return self._memory.numpy()


def decode_train_crops(
    data: bytearray,
    size: ImageSize,
    draws: Sequence[npt.NDArray[np.float64]],
    scratch: Scratch,
    scale: tuple[float, float] = (0.2, 1.0),
    hflip: bool = True,
    max_pixels: int = MAX_PIXELS,
    clips: bool = False,
) -> list[torch.Tensor]:
    """Return the pixels of `train_crop` of `decode_image` for each draw, but decode only once.

    No row below the lowest crop is decoded.

    Args:
        data: content of the image file.
        size: pixels of a side of the result, or its height and width.
        draws: float64 [TRAIN_UNIFORMS] for each crop.
        scratch: memory for decoding.
        scale, hflip: as for `train_crop`.
        max_pixels: as for `decode_image`.
        clips: as for `crop_box`.

    Returns:
        uint8 [3, height, width] for each draw.

    Raises:
        ValueError: the file is no image, or a damaged one, or one that is too large.
    """
    frame = _quick_frame(data, max_pixels)
    if frame is not None:
        ratio = aspect_of(size)
        boxes = [crop_box(frame.height, frame.width, u, scale, ratio, clips) for u in draws]
        lowest = max(top + height for top, _, height, _ in boxes)
        try:
            image = _decode_rows(data, frame, lowest, scratch)
        except ValueError:
            pass  # PIL names what is wrong
        else:
            return [
                _crop(image, box, size, hflip and u[2 * _TRIES + 2] < 0.5)
                for box, u in zip(boxes, draws, strict=True)
            ]
    image = decode_image(data, max_pixels)
    return [train_crop(image, size, u, scale, hflip, clips) for u in draws]


def _decode_rows(data: bytearray, frame: Frame, rows: int, scratch: Scratch) -> torch.Tensor:
    """Decode at least the first `rows` rows: uint8 [3, >= rows, W], in `scratch`.

    The decoder is told that the image ends there, and stops. It needs two more rows to interpolate
    the colours of the last one.
    """
    height = min(rows + 2, frame.height) if not frame.progressive else frame.height
    buffer = scratch.at_least(height * frame.width * 3)
    field = slice(frame.at + 5, frame.at + 7)
    original = data[field]
    data[field] = height.to_bytes(2, "big")
    try:
        return _from_rows(decode_jpeg(data, strict=False, buffer=buffer))
    finally:
        data[field] = original


def _crop(
    image: torch.Tensor, box: tuple[int, int, int, int], size: ImageSize, flip: bool
) -> torch.Tensor:
    top, left, h, w = box
    crop = _resize(image[:, top : top + h, left : left + w], *sides(size))
    return crop.flip(-1) if flip else crop


def fixed_crop(
    image: torch.Tensor, size: ImageSize, u: npt.NDArray[np.float64], hflip: bool = True
) -> torch.Tensor:
    """Crop a piece of fixed size, as large as `eval_crop`'s, at a random place, and flip it.

    Args:
        image: uint8 [C, H, W].
        size: pixels of a side of the result, or its height and width.
        u: float64 [TRAIN_UNIFORMS] in [0, 1); only the numbers for place and flip are used.
        hflip: whether to flip half of the images.

    Returns:
        uint8 [C, height, width].
    """
    resized, (height, width) = _resize_to_cover(image, size, _CROP_RATIO), sides(size)
    room = (resized.shape[1] - height + 1, resized.shape[2] - width + 1)
    top, left = (int(u[2 * _TRIES + i] * n) for i, n in enumerate(room))
    crop = resized[:, top : top + height, left : left + width]
    return crop.flip(-1) if hflip and u[2 * _TRIES + 2] < 0.5 else crop


def default_crop_ratio(size: ImageSize) -> float:
    """Return the share of the short side that the official evaluation crops at this size."""
    return _CROP_RATIO if min(sides(size)) <= 224 else 1.0


def eval_crop(
    image: torch.Tensor, size: ImageSize, crop_ratio: float = _CROP_RATIO
) -> torch.Tensor:
    """Resize so that the centre crop of `size` covers `crop_ratio` of the short side, and crop.

    Args:
        image: uint8 [C, H, W].
        size: pixels of a side of the result, or its height and width.
        crop_ratio: share of the short side; in the official evaluation 0.875 up to 224 pixels, 1.0
            above.

    Returns:
        uint8 [C, height, width].
    """
    resized, (height, width) = _resize_to_cover(image, size, crop_ratio), sides(size)
    top, left = round((resized.shape[1] - height) / 2), round((resized.shape[2] - width) / 2)
    return resized[:, top : top + height, left : left + width]


def _resize_to_cover(image: torch.Tensor, size: ImageSize, crop_ratio: float) -> torch.Tensor:
    """Resize so that a crop of `size` covers `crop_ratio` of one side, and at most of the other."""
    height, width = sides(size)
    if height == width:
        return _resize_short(image, int(height / crop_ratio))
    least = int(height / crop_ratio), int(width / crop_ratio)
    scale = max(least[0] / image.shape[1], least[1] / image.shape[2])
    # Sides that exceed the crop's proportions by far are cut before they take memory.
    most = [max(1, math.ceil(_MAX_ASPECT * n / scale)) for n in least]
    top, left = (max(0, n - m) // 2 for n, m in zip(image.shape[1:], most, strict=True))
    image = image[:, top : top + most[0], left : left + most[1]]
    resized = [max(n, int(scale * s)) for n, s in zip(least, image.shape[1:], strict=True)]
    return _resize(image, *resized)


def _resize_short(image: torch.Tensor, short: int) -> torch.Tensor:
    height, width = image.shape[1:]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:  # 1 x 20,000 pixels would become 256 x 5 million
        top, left = (max(0, n - longest) // 2 for n in (height, width))
        image = image[:, top : top + longest, left : left + longest]
        height, width = image.shape[1:]
    if width <= height:
        return _resize(image, int(short * height / width), short)
    return _resize(image, short, int(short * width / height))


def _resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # The vectorised kernel needs contiguous channels_last memory; a view of a crop has none.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 [..., 3, H, W] to float32 by ImageNet's mean and std, on its device."""
    mean, std = _mean_std(images.device)
    return (images.to(torch.float32) / 255 - mean) / std


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Undo `normalize`: return float32 [..., 3, H, W] in [0, 1] (clipped)."""
    mean, std = _mean_std(images.device)
    return (images.to(torch.float32) * std + mean).clamp(0, 1)


@lru_cache  # kept, because a copy to a GPU waits for the work that is queued there
def _mean_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    return mean, torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
