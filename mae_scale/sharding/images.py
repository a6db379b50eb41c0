"""Whether bytes are an image that can be decoded, and shrinking it."""

from __future__ import annotations

import io
import re
import struct
import warnings
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

# In entropy-coded data a marker is FF and anything but a stuffed 00, a restart, or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SEGMENT = struct.Struct(">BBH")  # FF, marker, length
_SIZE = struct.Struct(">HH")
_END, _SCAN = 0xD9, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what libjpeg decodes
_TABLES = {0xC4, 0xDB, 0xDD}  # Huffman, quantisation, restart interval
_COMMENTS = {*range(0xE0, 0xF0), 0xFE}
_MAX_PIXELS = 178_956_970  # PIL refuses more


def damage(data: bytes) -> str | None:
    """Why an image cannot be decoded, in a few words, or None where it can.

    Can be decoded means that PIL's ``Image.open(…).convert("RGB")`` gives pixels. Decoding each
    image would take ten times longer than writing it, so a JPEG whose segments follow each other
    from its first byte to its end marker, and whose tables libjpeg accepts, is taken for sound;
    whatever else there is, PIL decodes.
    """
    return None if _sound_jpeg(data) else decode_error(data)


def decode_error(data: bytes) -> str | None:
    """`damage` by decoding the whole image."""
    if not data:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.convert("RGB")
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # PIL's readers raise SyntaxError, struct.error and what not
        return str(error) or type(error).__name__
    return None


def _sound_jpeg(data: bytes) -> bool:
    if data[:2] != b"\xff\xd8":
        return False
    tables = [b"\xff\xd8"]
    at, pixels = 2, 0
    while at + 4 <= len(data):
        fill, marker, length = _SEGMENT.unpack_from(data, at)
        end = at + 2 + length
        if fill != 0xFF or end > len(data):
            return False
        if marker in _COMMENTS:
            pass
        elif marker in _TABLES:
            tables.append(data[at:end])
        elif marker in _FRAMES and not pixels:
            height, width = _SIZE.unpack_from(data, at + 5)
            pixels = height * width
            if not 0 < pixels <= _MAX_PIXELS:
                return False
            tables.append(data[at : at + 5] + b"\x00\x08\x00\x08" + data[at + 9 : end])
        elif marker == _SCAN and pixels:
            tables.append(data[at:end])
            found = _MARKER.search(data, end)
            if found is None:
                return False
            end = found.start()
            if data[end + 1] == _END:
                return _tables_decode(b"".join(tables) + b"\xff\xd9")
        else:
            return False
        at = end
    return False


@lru_cache(maxsize=4096)
def _tables_decode(small: bytes) -> bool:
    """Whether libjpeg takes these tables and scan headers, on an 8x8 image without data.

    Most images share their tables with many others.
    """
    return decode_error(small) is None


def shrink(data: bytes, short_side: int, quality: int) -> bytes:
    """An RGB JPEG whose short side is `short_side` pixels; a smaller image stays as it is.

    Raises:
        Exception: whatever PIL raises on a damaged image.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        short = min(width, height)
        if short <= short_side:
            image.convert("RGB")  # a damaged image must not pass
            return data
        size = (
            max(short_side, round(width * short_side / short)),
            max(short_side, round(height * short_side / short)),
        )
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return stream.getvalue()
