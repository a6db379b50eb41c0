"""Making progressive JPEGs baseline without loss: the pixels stay, and decoding is faster.

A progressive JPEG holds its coefficients in several scans, which the decoder must put together. The
same coefficients in one scan are decoded two to three times as fast and take a few per cent more
room.
"""

from __future__ import annotations

import os
from threading import Lock

import numpy as np

from mae_scale.data.formats import MAX_PIXELS, jpeg_frame, open_image, to_rgb
from mae_scale.errors import UserError

_LOCK = Lock()  # jpeglib is not known to be safe with two threads


def check_jpeglib() -> None:
    """Raise a UserError where jpeglib, which reads and writes coefficients, is missing."""
    try:
        import jpeglib  # noqa: F401
    except ImportError:
        raise UserError(
            "making progressive JPEGs baseline needs jpeglib: pip install 'mae-scale[baseline]'"
        ) from None


def is_progressive(data: bytes) -> bool:
    """Return whether the bytes are a progressive JPEG."""
    frame = jpeg_frame(data)
    return frame is not None and frame.progressive


def make_baseline(data: bytes, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """Return the baseline JPEG with the pixels of a progressive one; None if that fails.

    Both are decoded and compared, so the pixels are certain to be equal. Comments, profiles and
    EXIF may get lost: this program does not read them.

    Raises:
        Exception: the image is damaged; the error is PIL's.
    """
    with open_image(data, max_pixels) as image:
        before = np.asarray(to_rgb(image))
    try:
        made = _one_scan(data)
        with open_image(made, max_pixels) as image:
            same = not is_progressive(made) and np.array_equal(before, np.asarray(to_rgb(image)))
    except Exception:  # the image stays unchanged
        return None
    return made if same else None


def _one_scan(data: bytes) -> bytes:
    """Write the coefficients of a JPEG in one scan, in a file in memory: jpeglib needs a file."""
    import jpeglib

    files = [os.memfd_create(name) for name in ("before", "after")]
    try:
        os.write(files[0], data)
        with _LOCK:
            image = jpeglib.read_dct(f"/proc/self/fd/{files[0]}")
            image.progressive_mode = False
            image.write_dct(f"/proc/self/fd/{files[1]}", flags=["+OPTIMIZE_CODING"])
        return os.pread(files[1], os.fstat(files[1]).st_size, 0)
    finally:
        for file in files:
            os.close(file)
