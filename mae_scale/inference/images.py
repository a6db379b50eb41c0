"""Image files that a command is given, and the pictures that it writes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mae_scale.config.sizes import ImageSize
from mae_scale.data.bands import RGB, Bands, for_display
from mae_scale.data.formats import IMAGE_SUFFIXES, image_files
from mae_scale.data.transforms import eval_crop
from mae_scale.errors import UserError
from mae_scale.files import read_file, write_atomically


def find_images(paths: list[Path], most: int | None = None) -> list[tuple[Path, Path]]:
    """List image files, and those in folders, each with its path below the folder that was given.

    Args:
        paths: image files, and folders of them.
        most: largest number of files; where there are more, some at even distances are taken.

    Raises:
        UserError: a path does not exist, or a folder holds no images.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise UserError(f"{path} holds no images (.{', .'.join(IMAGE_SUFFIXES)})")
            found += [(file, file.relative_to(path)) for file in inside]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"there is no image or folder {path}")
    found = list(dict.fromkeys(found))
    number = len(found) if most is None else min(most, len(found))
    return [found[i * len(found) // number] for i in range(number)]


def read_image(file: Path, max_pixels: int, bands: Bands = RGB) -> torch.Tensor:
    """Read an image as uint8 [C, H, W].

    Args:
        file: image file.
        max_pixels: most pixels that the image may have.
        bands: bands of the image.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        return bands.decode(read_file(file), max_pixels)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} {error}") from None


def read_centre(
    file: Path, size: ImageSize, max_pixels: int, bands: Bands = RGB, crop_ratio: float = 1.0
) -> torch.Tensor:
    """Read the centre of an image, resized to `size`, as uint8 [C, height, width].

    Other arguments and errors are those of `read_image` and `eval_crop`.
    """
    return eval_crop(read_image(file, max_pixels, bands), size, crop_ratio)


def shown(image: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the pixels to show of an image with any bands: uint8 [C, H, W] to [H, W, 3]."""
    return for_display(image[None])[0].permute(1, 2, 0).numpy()


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture whole or not at all, and make the folder that it lies in."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stream.getvalue())
