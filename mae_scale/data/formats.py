"""Formats of images: suffixes, the largest size, conversion to RGB, the segments of a JPEG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

ARRAY_SUFFIX = "npy"  # an image with any bands; beside images of other formats, an annotation
# Suffixes of images in lower case, the usual ones first. If a sample of a tar has several images,
# the first one in this order is taken.
IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm",
    "gif", "avif", "jfif", "jpe", "jp2", "pbm", "pnm", "dib", ARRAY_SUFFIX,
)  # fmt: skip
MAX_PIXELS = 178_956_970  # PIL's own limit, a square of 13,377; larger images are refused
# Formats that PIL may open. It knows others that run programs, such as Ghostscript for PostScript.
PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")
_UNKNOWN = f"not a {', '.join(PIL_FORMATS[:-1])} or {PIL_FORMATS[-1]} image"
# Formats whose decoders hold several copies of an image. They may have a quarter of the pixels.
_HUNGRY = ("WEBP", "AVIF", "GIF", "JPEG2000")
MAX_FILE = 1 << 30  # largest file of an image or an annotation, in bytes


class TooLarge(ValueError):
    """An image has more pixels than are allowed."""


def is_image_name(name: str) -> bool:
    """Return whether a file's name is an image's: its suffix says so, and it is not hidden."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def is_array_name(name: str) -> bool:
    """Return whether a file's name is that of an array of numbers."""
    return name.lower().endswith(f".{ARRAY_SUFFIX}")


def image_files(folder: Path) -> list[Path]:
    """List the images below a folder; arrays only where there are no images of other formats."""
    found = sorted(path for path in folder.rglob("*") if is_image_name(path.name))
    return [path for path in found if not is_array_name(path.name)] or found


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise `TooLarge` where an image has too many pixels; call it before memory is taken."""
    if width * height > max_pixels:
        raise TooLarge(
            f"has {width} x {height} = {width * height:,} pixels, more than {max_pixels:,}"
        )


def open_image(data: bytes | bytearray | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image of `PIL_FORMATS` with PIL, which reads its header and decodes nothing.

    All of the package opens images here, except for arrays, TIFFs of many bands, and JPEGs that
    simplejpeg decodes.

    Raises:
        TooLarge: the image has too many pixels.
        UnidentifiedImageError: the data are no image of these formats; the message names them.
        Exception: the image is damaged; the error is PIL's.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2 + 1  # the user allows more than PIL does
    try:
        file = io.BytesIO(data) if isinstance(data, (bytes, bytearray)) else data
        image = Image.open(file, formats=PIL_FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(f"has more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_UNKNOWN) from None
    check_pixels(*image.size, max_pixels // (4 if image.format in _HUNGRY else 1))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB of 8 bits: scale gray of 16 bits, and leave the rest to ``convert("RGB")``.

    PIL's own conversion would clip 16 bits to white.

    Raises:
        ValueError: the pixels are integers or floats of 32 bits outside of 0 to 255, so that nobody
            can say which value is white.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if image.mode == "I" and low >= 0 and 255 < high <= 65535:  # 16 bits in a wider type
            return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
        if not (low >= 0 and 1 < high <= 255):
            raise ValueError(
                f"has 32-bit values from {low:g} to {high:g} (mode {image.mode}), of which nobody "
                "can say what is white: convert it to 8 or 16 bits"
            )
    return image.convert("RGB")


# Arrays, which hold images of any number of bands

_ARRAY_MAGIC = b"\x93NUMPY"


def is_array(data: bytes | bytearray) -> bool:
    """Return whether a file is an array that `numpy.save` wrote."""
    return data[:6] == _ARRAY_MAGIC


def read_array(data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """Read an array of numbers, [H, W], [H, W, bands] or [bands, H, W], without unpickling.

    Raises:
        TooLarge: the array has too many pixels.
        ValueError: the file is another array, or not whole.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # numpy's parser of headers raises many kinds of error
        raise ValueError(f"cannot be read as an array ({error})") from error
    if dtype.kind not in "uif" or not 2 <= len(shape) <= 3 or 0 in shape:
        raise ValueError(
            f"is an array of shape {shape} and type {dtype}; expected numbers, [H, W], "
            "[H, W, bands] or [bands, H, W]"
        )
    height, width = sorted(shape)[-2:]
    check_pixels(width, height, max_pixels)
    if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"does not hold the {math.prod(shape)} values of its header")
    values = np.frombuffer(data, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes | bytearray) -> bool:
    """Return whether a file is a TIFF, which may have more bands than PIL reads."""
    return data[:4] in _TIFF_MAGIC


def read_tiff(data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> npt.NDArray[Any]:
    """Read a TIFF whose bands are stored as samples of a pixel, or as pages.

    Overviews and masks, which GeoTIFFs have as further pages, are left out.

    Returns:
        Unscaled numbers, [H, W], [H, W, bands] or [bands, H, W].

    Raises:
        ImportError: tifffile is missing.
        TooLarge: the image has too many pixels, or its pages take more than 4 bytes for each pixel
            that is allowed.
        Exception: the file is damaged, or of a kind that tifffile cannot read; the error is
            tifffile's.
    """
    import tifffile  # it reads more kinds of TIFF than PIL

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [page.aspage() for page in file.pages]
        pages = [page for page in pages if not (page.is_reduced or page.is_mask)]
        first = pages[0]
        check_pixels(first.imagewidth, first.imagelength, max_pixels)
        if any(page.shape != first.shape for page in pages):
            pages = [first]
        decoded = sum(math.prod(page.shape) * -(-page.bitspersample // 8) for page in pages)
        if decoded > 4 * max_pixels:  # many pages may share the bytes of one in the file
            raise TooLarge(f"has {decoded:,} bytes decoded, more than {4 * max_pixels:,}")
        if len(pages) == 1:
            return first.asarray()
        return np.stack([page.asarray() for page in pages])


# JPEG


class Segment(NamedTuple):
    """A segment of a JPEG's header."""

    marker: int
    start: int  # offset of its byte FF
    end: int  # offset behind its last byte


class Frame(NamedTuple):
    """Content of a JPEG's frame header."""

    at: int  # offset of its first byte in the file
    progressive: bool
    height: int
    width: int
    components: int


FRAME_MARKERS = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, which libjpeg decodes
SCAN_MARKER, END_MARKER = 0xDA, 0xD9


def jpeg_segments(data: bytes | bytearray, at: int = 2) -> Iterator[Segment]:
    """Yield the segments of a JPEG from byte `at` on, until no further one follows."""
    end = len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        start, at = at, at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield Segment(marker, start, at)


def jpeg_frame(data: bytes | bytearray) -> Frame | None:
    """Return the frame header before the first scan of a JPEG; None if there is none."""
    if data[:2] != b"\xff\xd8":
        return None
    for marker, at, _ in jpeg_segments(data):
        if marker in FRAME_MARKERS:
            if at + 10 > len(data):
                return None
            height, width = (data[at + i] << 8 | data[at + i + 1] for i in (5, 7))
            return Frame(at, marker == 0xC2, height, width, data[at + 9])
        if marker == SCAN_MARKER:
            return None
    return None
