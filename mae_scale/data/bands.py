"""The bands of images: how many there are, how images are decoded to 8 bits and normalised.

Ordinary images have three bands, their colours. Gray, satellite and microscope images have other
numbers of bands: they are PNGs, TIFFs, or arrays that `numpy.save` wrote. All of these are decoded
to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mae_scale.data.formats import (
    MAX_PIXELS,
    TooLarge,
    is_array,
    is_tiff,
    open_image,
    read_array,
    read_tiff,
)
from mae_scale.data.transforms import IMAGENET_MEAN, IMAGENET_STD, decode_image
from mae_scale.errors import UserError

_PNG_BITS = 24  # offset of the byte with the number of bits of a sample


@dataclass(frozen=True)
class Bands:
    """Bands of a run's images, and how they are decoded and normalised."""

    count: int = 3
    """Number of bands."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each band, for values from 0 (black) to 1 (white)."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each band, for values from 0 to 1."""
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    """Values that become black and white, for all bands or for each; values beyond are clipped.
    None: the smallest and largest integers of 8 or 16 bits."""

    @classmethod
    def of(cls, config: Any) -> Bands:
        """Make the bands of a run's config.

        Raises:
            UserError: the config has statistics for another number of bands, or none although this
                number has no default.
        """
        count, data = getattr(config.model, "in_chans", 3), config.data
        given = [key for key in ("mean", "std", "value_range") if getattr(data, key) is not None]
        if given and not hasattr(config.model, "in_chans"):
            raise UserError(f"data.{given[0]}: {config.task} takes ordinary images of three bands")
        try:
            value_range = checked_range(data.value_range, count)
        except ValueError as error:
            raise UserError(f"data.value_range {error}") from None
        if data.mean is None and data.std is None and count == 3:
            return cls(value_range=value_range)
        if data.mean is None or data.std is None:
            raise UserError(
                f"model.in_chans {count} needs data.mean and data.std, a number for each band; "
                f"`mae-scale stats {data.train} --in_chans {count}` computes them"
            )
        if not len(data.mean) == len(data.std) == count:
            raise UserError(
                f"data.mean has {len(data.mean)} numbers and data.std {len(data.std)}; expected "
                f"one for each of the {count} bands (model.in_chans)"
            )
        return cls(count, tuple(data.mean), tuple(data.std), value_range)

    @property
    def are_plain(self) -> bool:
        """Whether images are decoded as `transforms.decode_image` does it."""
        return self.count == 3 and self.value_range is None

    def decode(self, data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Decode an image file to uint8 [bands, H, W].

        Raises:
            ValueError: the file is no image, or the image is damaged, too large, or has another
                number of bands.
        """
        if self.are_plain and not is_array(data):
            return decode_image(data, max_pixels)
        values = self._as_bytes(raw_values(data, self.count, max_pixels))
        return torch.from_numpy(values).permute(2, 0, 1)

    def _as_bytes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Scale [H, W, bands] of any numeric type to 8 bits."""
        if self.value_range is None:
            if values.dtype == np.uint8:
                return np.array(values, order="C")
            if values.dtype.newbyteorder("=") != np.uint16:
                raise ValueError(
                    f"has values of the type {values.dtype}, of which nobody can say what is black "
                    "and white; give data.value_range"
                )
            return np.round(values / 257).astype(np.uint8)
        low, high = np.array(self.value_range, np.float64).T  # numbers, or one for each band
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        if not np.isfinite(scaled).all():
            raise ValueError("has values that are not finite")
        return np.round(scaled.clip(0, 255)).astype(np.uint8)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 [..., bands, H, W] to float32 by mean and std, on its device."""
        mean, std = _mean_std(self, images.device)
        return (images.to(torch.float32) / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Undo `normalize`: return float32 [..., bands, H, W] in [0, 1] (clipped)."""
        mean, std = _mean_std(self, images.device)
        return (images.to(torch.float32) * std + mean).clamp(0, 1)


RGB = Bands()


def checked_range(value_range: Any, count: int) -> Any:
    """Return a range of values, or a range for each band, as tuples; None stays None.

    Args:
        value_range: a pair of numbers, or a sequence of pairs.
        count: number of bands.

    Raises:
        ValueError: a pair does not rise, or there are not as many pairs as bands.
    """
    if value_range is None:
        return None
    is_pair = not isinstance(value_range[0], (list, tuple)) if value_range else False
    pairs = [tuple(pair) for pair in ([value_range] if is_pair else value_range)]
    if not is_pair and len(pairs) != count:
        raise ValueError(f"has {len(pairs)} pairs; expected one pair for all, or {count}")
    for low, high in pairs:
        if not low < high:
            raise ValueError(f"[{low:g}, {high:g}] must rise")
    return pairs[0] if is_pair else tuple(pairs)


@lru_cache  # kept, because a copy to a GPU waits for the work that is queued there
def _mean_std(bands: Bands, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(v, device=device).view(bands.count, 1, 1) for v in (bands.mean, bands.std)
    )
    return mean, std


def raw_values(
    data: bytes | bytearray, count: int | None, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[Any]:
    """Read the values of an image file unscaled, [H, W, count] of any numeric type.

    Args:
        count: number of bands; None: any number, fewer than rows and columns.

    Raises:
        ValueError: the file is no image, or the image is damaged, too large, or has another number
            of bands.
    """
    if is_array(data):
        return _bands_last(read_array(data, max_pixels), count)
    try:
        return _bands_last(_picture(data, count, max_pixels), count)
    except TooLarge:
        raise
    except _OtherBands:
        raise
    except Exception as error:  # the libraries pass on all errors of their decoders
        raise ValueError(f"cannot be decoded ({error})") from error


def _picture(data: bytes | bytearray, count: int | None, max_pixels: int) -> npt.NDArray[Any]:
    """Read a file that is no array; errors of PIL and tifffile are passed on."""
    if is_tiff(data):
        try:
            values = read_tiff(data, max_pixels)
        except ImportError:
            raise ValueError("TIFFs need tifffile: pip install 'mae-scale[tiff]'") from None
        if count != 1 or values.ndim == 2 or 1 in values.shape:
            return values
    with open_image(data, max_pixels) as image:
        if data[1:4] == b"PNG" and data[_PNG_BITS] == 16 and not image.mode.startswith("I"):
            raise ValueError("a PNG of several bands with 16 bits: make a TIFF or an array of it")
        if count == 1 and image.mode not in ("L", "I", "F") and image.mode[0] != "I":
            return np.array(image.convert("L"))
        if count == 3 and image.mode in ("L", "P", "RGBA", "CMYK", "1", "LA", "YCbCr"):
            return np.array(image.convert("RGB"))
        return np.array(image)


class _OtherBands(ValueError):
    """An image has another number of bands than was expected."""


def _bands_last(values: npt.NDArray[Any], count: int | None) -> npt.NDArray[Any]:
    """Bring [H, W], [H, W, count] or [count, H, W] into the form [H, W, count]."""
    if values.ndim == 2:
        values = values[..., None]
    count = min(values.shape[0], values.shape[-1]) if count is None else count
    if values.shape[-1] != count and values.shape[0] == count:
        values = values.transpose(1, 2, 0)
    if values.shape[-1] != count:
        found = min(values.shape[0], values.shape[-1])
        raise _OtherBands(f"has {found} bands, expected {count} (in_chans)")
    return values


def for_display(images: torch.Tensor) -> torch.Tensor:
    """Make three bands of [N, bands, H, W] for display: gray from one, else the first three."""
    count = images.shape[1]
    if count == 1:
        return images.expand(-1, 3, -1, -1)
    if count == 2:
        return torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
    return images[:, :3]


def picture(data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image file of any number of bands for display, to uint8 [3, H, W].

    Values of which nobody can say what is black and white span black to white.

    Raises:
        ValueError: the file is no image, or the image is damaged or too large.
    """
    try:
        return RGB.decode(data, max_pixels)
    except TooLarge:
        raise
    except ValueError:
        if not (is_array(data) or is_tiff(data)):
            raise
    values = raw_values(data, None, max_pixels).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    with np.errstate(all="ignore"):
        scaled = np.nan_to_num((values - low) / max(high - low, 1e-12) * 255).clip(0, 255)
    images = torch.from_numpy(np.round(scaled).astype(np.uint8)).permute(2, 0, 1)
    return for_display(images[None])[0]


def statistics(
    images: Iterable[torch.Tensor],
) -> tuple[list[float], list[float]]:
    """Compute mean and deviation of each band over all pixels, for values from 0 to 1.

    Args:
        images: uint8 [bands, H, W] each.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for image in images:
        values = image.flatten(1).double() / 255
        count += values.shape[1]
        total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), std.tolist()
