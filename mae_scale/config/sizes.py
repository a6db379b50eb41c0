"""Sizes of images: a number for a square, or height and width."""

from __future__ import annotations

from collections.abc import Sequence

ImageSize = int | tuple[int, int]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width in pixels."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def plain_size(size: int | Sequence[int]) -> ImageSize:
    """Return a number for a square, and height and width for anything else, in pixels."""
    height, width = sides(size)
    return height if height == width else (height, width)


def size_text(size: int | Sequence[int]) -> str:
    """Write a size as `224` or `224 x 448`, height first."""
    height, width = sides(size)
    return str(height) if height == width else f"{height} x {width}"
