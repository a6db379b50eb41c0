"""Checking whether bytes are an image that can be decoded, and shrinking images."""

from __future__ import annotations

import io
import re
import struct
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_scale.data.formats import (
    END_MARKER,
    FRAME_MARKERS,
    MAX_PIXELS,
    SCAN_MARKER,
    is_array,
    is_tiff,
    jpeg_segments,
    open_image,
    read_array,
    read_tiff,
    to_rgb,
)

# In entropy-coded data a marker is FF, followed by anything but 00, a restart or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SIZE = struct.Struct(">HH")
_TABLES = {0xC4, 0xDB, 0xDD}  # Huffman tables, quantisation tables, restart interval
_COMMENTS = {*range(0xE0, 0xF0), 0xFE}


def image_damage(data: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return in a few words why an image cannot be decoded; None if it can.

    An image can be decoded if PIL's ``Image.open(…).convert("RGB")`` succeeds. Decoding each
    image would take ten times longer than writing it. So a JPEG counts as sound if its segments
    follow each other from its first byte to its end marker, and libjpeg accepts its tables; PIL
    decodes everything else. An image of more than `max_pixels` is refused by its header, before
    anything is decoded.
    """
    return None if _sound_jpeg(data, max_pixels) else decode_error(data, max_pixels)


def decode_error(data: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return the same as `image_damage`, by decoding the whole image."""
    if not data:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_array(data):
                read_array(data, max_pixels)
                return None
            with open_image(data, max_pixels) as image:
                to_rgb(image)
    except UnidentifiedImageError as error:
        return _tiff_error(data, max_pixels) if is_tiff(data) else str(error)
    except Exception as error:  # PIL's readers raise SyntaxError, struct.error and others
        return str(error) or type(error).__name__
    return None


def _tiff_error(data: bytes, max_pixels: int) -> str | None:
    """Return why a TIFF that PIL refuses cannot be decoded; None if it merely has many bands."""
    try:
        read_tiff(data, max_pixels)
    except ImportError:
        return "a TIFF that PIL cannot read; pip install 'mae-scale[tiff]' reads more kinds"
    except Exception as error:  # tifffile and its decoders raise many kinds of error
        return str(error) or type(error).__name__
    return None


def _sound_jpeg(data: bytes, max_pixels: int) -> bool:
    if data[:2] != b"\xff\xd8":
        return False
    tables = [b"\xff\xd8"]
    begin, pixels = 2, 0
    while True:
        for marker, at, end in jpeg_segments(data, begin):
            if end > len(data):
                return False
            if marker in _TABLES:
                tables.append(data[at:end])
            elif marker in FRAME_MARKERS and not pixels:
                height, width = _SIZE.unpack_from(data, at + 5)
                pixels = height * width
                if not 0 < pixels <= max_pixels:
                    return False
                tables.append(data[at : at + 5] + b"\x00\x08\x00\x08" + data[at + 9 : end])
            elif marker == SCAN_MARKER and pixels:
                tables.append(data[at:end])
                break
            elif marker not in _COMMENTS:
                return False
        else:
            return False
        if begin == 2 and _only_end_marker(data, end):
            begin = len(data) - 2
        else:
            found = _MARKER.search(data, end)
            if found is None:
                return False
            begin = found.start()
        if data[begin + 1] == END_MARKER:
            return _tables_decode(b"".join(tables) + b"\xff\xd9")


def _only_end_marker(data: bytes, at: int) -> bool:
    """Return whether a JPEG's end marker is its last two bytes, and the only marker from `at` on.

    This holds for most images, and numpy checks it in half the time of the search for a marker.
    """
    if data[-2:] != b"\xff\xd9" or at + 2 > len(data):
        return False
    entropy_coded = np.frombuffer(data, np.uint8)[at:-2]
    marker = entropy_coded[:-1] == 0xFF
    marker &= entropy_coded[1:] != 0
    return not marker.any()


@lru_cache(maxsize=4096)
def _tables_decode(small: bytes) -> bool:
    """Return whether libjpeg accepts these tables and scan headers, on an 8x8 image without data.

    Results are cached, because most images share their tables with many others.
    """
    return decode_error(small) is None


def shrink(data: bytes, short_side: int, quality: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Make an RGB JPEG whose short side is `short_side` pixels.

    A smaller image stays unchanged, and so does an image whose bands a JPEG cannot hold: an array,
    or a TIFF with many bands or pages.

    Raises:
        Exception: the image is damaged; the error is PIL's or tifffile's.
    """
    if is_array(data):
        read_array(data, max_pixels)
        return data
    try:
        opened = open_image(data, max_pixels)
    except UnidentifiedImageError:
        if is_tiff(data) and _tiff_error(data, max_pixels) is None:
            return data
        raise
    with opened as image:
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            return data
        width, height = image.size
        short = min(width, height)
        if short <= short_side:
            to_rgb(image)  # a damaged image must not pass
            return data
        size = (
            max(short_side, round(width * short_side / short)),
            max(short_side, round(height * short_side / short)),
        )
        small = to_rgb(image).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return stream.getvalue()
