"""Random changes of training images; all of them follow from (seed, epoch, sample)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from mae_scale.config.sizes import ImageSize, sides
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.formats import MAX_PIXELS, is_array
from mae_scale.data.transforms import (
    IMAGENET_MEAN,
    Scratch,
    decode_train_crops,
    eval_crop,
    fixed_crop,
    train_crop,
)
from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, hash64, permutation, uniform


class Augment:
    """Crop and flip, then colour jitter, RandAugment, random erasing (paper Tables 1e and 9).

    RandAugment and random erasing are timm's. They draw from the global generators of Python, numpy
    and torch, which are seeded anew for each image; the state of torch's is restored. The noise of
    an erased rectangle is normal after normalisation, as in the official code. But pixels travel as
    uint8, so the values beyond black and white, 3 % of them, are clipped to these.

    Args:
        crop_scale: smallest and largest share of the image's area in a crop.
        hflip: whether to flip half of the images.
        rand_augment: policy in timm's spelling, such as "rand-m9-mstd0.5-inc1"; None: no policy.
        erasing: share of the images in which a rectangle becomes noise.
        crop: "random" is a RandomResizedCrop; "clipped" takes the first box of one, clipped to the
            image; "fixed" takes a square of fixed size; "none" takes the centre and never flips.
        color_jitter: strength s. Brightness, contrast and saturation are each multiplied by a
            factor uniform in 1 - s to 1 + s, in random order. 0: no change.

    Raises:
        UserError: a value is not allowed.
    """

    def __init__(
        self,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        hflip: bool = True,
        rand_augment: str | None = None,
        erasing: float = 0.0,
        crop: Literal["none", "fixed", "random", "clipped"] = "random",
        color_jitter: float = 0.0,
    ) -> None:
        low, high = crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_scale {list(crop_scale)} must rise from above 0 to 1")
        if not 0 <= erasing <= 1:
            raise UserError(f"erasing {erasing} must lie in 0 to 1")
        if not 0 <= color_jitter <= 1:
            raise UserError(f"color_jitter {color_jitter} must lie in 0 to 1")
        self._crop, self._crop_scale, self._hflip = crop, crop_scale, hflip
        self._color_jitter = color_jitter
        self._rand_augment, self._erasing = rand_augment, erasing
        self._scratch = Scratch()
        self._operations: dict[int, Any] = {}  # RandAugment for each image size
        if rand_augment is not None:
            self._operations_for(224)

    @classmethod
    def of(cls, section: Any) -> Augment:
        """Make the changes of a config section `augment`, whose keys are the arguments' names."""
        names = signature(cls).parameters
        return cls(**{k: v for k, v in vars(section).items() if k in names})

    def __call__(
        self,
        data: bytearray,
        size: ImageSize,
        draws: Sequence[npt.NDArray[np.float64]],
        keys: Sequence[tuple[int, int, int]],
        max_pixels: int = MAX_PIXELS,
        bands: Bands = RGB,
    ) -> list[torch.Tensor]:
        """Make the pixels of an image file, decoded once, for each of the draws.

        Args:
            data: content of the image file.
            size: pixels of a side of the result, or its height and width.
            draws: float64 [TRAIN_UNIFORMS] in [0, 1) each, for crop and flip.
            keys: seed, epoch and sample of each draw, for the other changes.
            max_pixels: a larger image is refused before it is decoded.
            bands: bands of the image; RandAugment and colour jitter accept three only.

        Returns:
            uint8 [C, height, width] for each draw.

        Raises:
            ValueError: the file is no image, or the image is damaged or too large.
        """
        crops = self._crops(data, size, draws, max_pixels, bands)
        pairs = zip(crops, keys, strict=True)
        return [self._vary(pixels, min(sides(size)), key, bands) for pixels, key in pairs]

    def _vary(
        self, pixels: torch.Tensor, size: int, keys: tuple[int, int, int], bands: Bands
    ) -> torch.Tensor:
        if self._color_jitter:
            pixels = _jitter(pixels, self._color_jitter, keys)
        if self._rand_augment is None and not self._erasing:
            return pixels
        key = int(hash64(Purpose.IMAGE_OPERATIONS, *keys))
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        if self._rand_augment is not None:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            try:
                image = self._operations_for(size)(image)
            except ValueError as error:  # callers take a ValueError to mean a damaged image
                raise RuntimeError(f"RandAugment failed: {error}") from error
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if random.random() < self._erasing:
            pixels = _erase(pixels, key, bands)
        return pixels

    def _crops(
        self,
        data: bytearray,
        size: ImageSize,
        draws: Sequence[npt.NDArray[np.float64]],
        max_pixels: int,
        bands: Bands,
    ) -> list[torch.Tensor]:
        if self._crop == "none":
            return [eval_crop(bands.decode(data, max_pixels), size)] * len(draws)
        clips = self._crop == "clipped"
        if self._crop == "fixed" or not bands.are_plain or is_array(data):
            image = bands.decode(data, max_pixels)
            if self._crop == "fixed":
                return [fixed_crop(image, size, u, self._hflip) for u in draws]
            how = (self._crop_scale, self._hflip, clips)
            return [train_crop(image, size, u, *how) for u in draws]
        return decode_train_crops(
            data,
            size,
            draws,
            self._scratch,
            self._crop_scale,
            self._hflip,
            max_pixels,
            clips=clips,
        )

    def _operations_for(self, size: int) -> Any:
        if size not in self._operations:
            from timm.data.auto_augment import rand_augment_transform

            hints = {  # the values of timm's create_transform
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
                "interpolation": Image.Resampling.BICUBIC,
            }
            try:
                operations = rand_augment_transform(str(self._rand_augment), hints)
            except (AssertionError, ValueError, IndexError, KeyError):
                raise UserError(
                    f"rand_augment '{self._rand_augment}' is not in timm's spelling; "
                    "expected something like rand-m9-mstd0.5-inc1"
                ) from None
            for operation in operations.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
            self._operations[size] = operations
        return self._operations[size]


def _jitter(pixels: torch.Tensor, strength: float, keys: tuple[int, int, int]) -> torch.Tensor:
    """Change brightness, contrast and saturation as torchvision does, by factors from the keys."""
    from torchvision.transforms.v2 import functional

    change = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    draws = uniform(Purpose.COLOR_JITTER, *keys, np.arange(3))
    for which in permutation(3, Purpose.COLOR_JITTER, *keys, 3):
        pixels = change[which](pixels, 1 + strength * (2 * draws[which] - 1))
    return pixels


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Posterize as timm does: its highest magnitude keeps 0 bits, which newer Pillows refuse."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _erase(pixels: torch.Tensor, key: int, bands: Bands) -> torch.Tensor:
    """Fill a rectangle with noise; its place comes from Python's generator, which is seeded."""
    from timm.data.random_erasing import RandomErasing

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key >> 1)
        erased = RandomErasing(probability=1.0, mode="pixel", device="cpu")(bands.normalize(pixels))
    return (bands.denormalize(erased) * 255).round().to(torch.uint8)
