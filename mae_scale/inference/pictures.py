"""Drawing what a model sees in an image: names with scores, boxes and masks, coloured maps."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
Color = tuple[int, int, int]  # red, green, blue, from 0 to 255

_PANEL = 260  # width of the text beside a picture, in pixels
_LINE = 22  # height of a line, in pixels
_MARGIN = 10  # in pixels
_SMALLEST = 320  # pixels of the long side; smaller images are enlarged by a whole factor
_MOST_LINES = 24  # largest number of lines of a legend


def color_of(number: int) -> Color:
    """Return the colour of a class; neighbours differ by the golden angle of the colour circle."""
    hue, value = number * 0.61803398875 % 1, (1.0, 0.8, 0.6)[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def ranked_names(pixels: Pixels, names: Sequence[str], scores: Sequence[float]) -> Image.Image:
    """Draw the image, and beside it class names with a bar for each score.

    Args:
        pixels: uint8 [H, W, 3].
        names, scores: names of the classes and their scores, from 0 to 1, the best first.
    """
    lines = [(f"{score:6.1%}  {name}", None) for name, score in zip(names, scores, strict=True)]
    picture = _with_panel(_enlarged(pixels), lines)
    draw = ImageDraw.Draw(picture)
    left = picture.width - _PANEL + _MARGIN
    for i, score in enumerate(scores):
        bottom = _MARGIN + (i + 1) * _LINE - 2
        draw.rectangle((left, bottom - 2, left + score * (_PANEL - 2 * _MARGIN), bottom), "#1f5fa8")
    return picture


def objects(
    pixels: Pixels,
    boxes: Sequence[Sequence[float]],
    masks: npt.NDArray[np.bool_],
    names: Sequence[str],
    numbers: Sequence[int],
    scores: Sequence[float],
) -> Image.Image:
    """Draw the image with the mask, the box, the name and the score of each object.

    Args:
        pixels: uint8 [H, W, 3].
        boxes: x0, y0, x1, y1 of each object, in pixels.
        masks: bool [n, H, W].
        names, numbers, scores: name of the class, number of the class and score of each object.
    """
    shown = pixels.astype(np.float32)
    for mask, number in zip(masks, numbers, strict=True):
        shown[mask] = 0.5 * shown[mask] + 0.5 * np.array(color_of(number), np.float32)
    picture = _enlarged(shown.astype(np.uint8))
    zoom = picture.width // pixels.shape[1]
    draw, font = ImageDraw.Draw(picture), _font()
    for box, name, number, score in zip(boxes, names, numbers, scores, strict=True):
        color = color_of(number)
        x0, y0, x1, y1 = (zoom * value for value in box)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=2)
        text = f"{name} {score:.2f}"
        place = (x0, max(0, y0 - 16))
        draw.rectangle(draw.textbbox(place, text, font), fill=color)
        draw.text(place, text, "white", font)
    return picture


def class_map(pixels: Pixels, classes: npt.NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """Draw the image half covered by a colour for each class, and a legend with their shares.

    Args:
        pixels: uint8 [H, W, 3].
        classes: int64 [H, W].
        names: names of all classes.
    """
    palette = np.array([color_of(number) for number in range(len(names))], np.float32)
    shown = (0.4 * pixels + 0.6 * palette[classes]).astype(np.uint8)
    numbers, counts = np.unique(classes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    lines = [
        (f"{counts[i] / classes.size:6.1%}  {names[numbers[i]]}", color_of(int(numbers[i])))
        for i in order.tolist()
    ]
    return _with_panel(_enlarged(shown), lines)


def rows_of_images(
    rows: Sequence[Sequence[tuple[Pixels, str, Color | None]]], header: Sequence[str]
) -> Image.Image:
    """Draw rows of images, each with a line of text below it and, if wanted, a coloured frame.

    Args:
        rows: for each image its pixels, uint8 [H, W, 3], all of one size, its text, and the colour
            of its frame; None: no frame.
        header: text above each column; it may cover fewer columns than there are.
    """
    first = _enlarged(rows[0][0][0])
    zoom, (width, height) = first.width // rows[0][0][0].shape[1], first.size
    step_x, step_y = width + 2 * _MARGIN, height + 2 * _MARGIN + _LINE
    canvas = Image.new("RGB", (step_x * len(rows[0]), _LINE + step_y * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), _font()
    for column, word in enumerate(header):
        draw.text((column * step_x + _MARGIN, 4), word, "#222222", font)
    for number, row in enumerate(rows):
        for column, (pixels, text, color) in enumerate(row):
            left, top = column * step_x + _MARGIN, _LINE + number * step_y + _MARGIN
            if color is not None:
                draw.rectangle((left - 4, top - 4, left + width + 3, top + height + 3), fill=color)
            tile = Image.fromarray(np.ascontiguousarray(pixels))
            tile = tile.resize((tile.width * zoom, tile.height * zoom), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top))
            draw.text((left, top + height + 6), _fitting(text, width // 7), "#222222", font)
    return canvas


def _enlarged(pixels: Pixels) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    zoom = max(1, _SMALLEST // max(picture.size))
    size = (picture.width * zoom, picture.height * zoom)
    return picture.resize(size, Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def _with_panel(picture: Image.Image, lines: Sequence[tuple[str, Color | None]]) -> Image.Image:
    """Draw the picture with lines of text to its right.

    Args:
        picture: picture to draw.
        lines: text of each line, and the colour of the patch before it; None: no patch.
    """
    if len(lines) > _MOST_LINES:
        rest = len(lines) - _MOST_LINES + 1
        lines = [*lines[: _MOST_LINES - 1], (f"and {rest} more", None)]
    height = max(picture.height, 2 * _MARGIN + len(lines) * _LINE)
    canvas = Image.new("RGB", (picture.width + _PANEL, height), "white")
    canvas.paste(picture, (0, 0))
    draw, font, left = ImageDraw.Draw(canvas), _font(), picture.width + _MARGIN
    for i, (text, color) in enumerate(lines):
        top, indent = _MARGIN + i * _LINE, 0
        if color is not None:
            draw.rectangle((left, top + 2, left + 13, top + 15), fill=color)
            indent = 20
        draw.text((left + indent, top), _fitting(text, 34), "#222222", font)
    return canvas


def _fitting(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
