"""A contact sheet of a folder of shards: what training will see, with label number and name."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mae_scale.data.bands import picture
from mae_scale.data.reader import ShardReader, shard_cache
from mae_scale.data.remote import is_remote, printable
from mae_scale.data.shards import NO_LABEL, open_shards
from mae_scale.files import write_atomically

PREVIEW = "preview.png"  # name of the picture beside the shards
CLASSES = 24  # largest number of classes in a picture
PER_CLASS = 4  # largest number of samples of a class
_SOFTWARE = "mae-scale"  # note in the picture, by which it is known again
_TILE = 112  # side of the square in which an image is shown, in pixels
_GAP = 8  # pixels
_LINE = 13  # height of a line of text, in pixels
_GREY = 225

Sample = tuple[torch.Tensor, int | None, str]  # uint8 [3, H, W], label, name


def chosen(labels: npt.NDArray[np.integer]) -> list[int]:
    """Choose the samples of a picture: up to `PER_CLASS` of each of up to `CLASSES` classes.

    Classes are spread evenly over those that occur, and samples over those of a class. The same
    labels always give the same choice.

    Args:
        labels: int [n], label of each sample; samples without one (-1) count as one class.

    Returns:
        Places of the samples, in the order of their labels.
    """
    if not len(labels):
        return []
    labels = np.asarray(labels)
    found = np.unique(labels)
    most = PER_CLASS if len(found) > 1 else PER_CLASS * CLASSES
    places: list[int] = []
    for label in _spread(found, CLASSES):
        places += _spread(np.flatnonzero(labels == label), most).tolist()
    return places


def _spread(values: npt.NDArray, most: int) -> npt.NDArray:
    """Take up to `most` values at even distances, the first and the last among them."""
    return values[np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def is_preview(path: Path) -> bool:
    """Return whether a file is a picture that `sheet` has written."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except OSError:
        return False


def preview(folder: Path, out: Path) -> list[tuple[str, int | None]]:
    """Draw a few samples of a finished folder of shards, read as training reads them.

    Of tars that lie elsewhere only the first one is fetched.

    Args:
        folder: folder with a manifest.
        out: PNG to write or replace.

    Returns:
        Name of the file and label (None: it has none) of each sample in the picture.

    Raises:
        UserError: the folder is no finished folder of shards.
        OSError: a shard cannot be read, or `out` cannot be written.
    """
    with TemporaryDirectory() as cache_dir:
        shards = open_shards(folder, cache_dir)
        count = int(shards.samples[0]) if is_remote(shards.files[0]) else len(shards)
        labels = shards.index["label"][:count]
        samples: list[Sample] = []
        found: list[tuple[str, int | None]] = []
        with closing(ShardReader(shards, shard_cache(shards, cache_dir, None))) as reader:
            for place in chosen(labels):
                member, label = reader.read(place), int(labels[place])
                has_class = label != NO_LABEL and label < len(shards.classes)
                name = shards.classes[label] if has_class else member.name
                try:
                    pixels = picture(member.data)
                except ValueError as error:
                    pixels, name = torch.full((3, 1, 1), _GREY, dtype=torch.uint8), str(error)
                samples.append((pixels, label if has_class else None, name))
                found.append((member.name, label if has_class else None))
    draw(samples, out)
    return found


def draw(samples: Iterable[Sample], out: Path) -> None:
    """Draw a contact sheet: images, and under each its label number and name.

    Images of one class stand side by side. Beyond `CLASSES` classes and `PER_CLASS` images of
    each, images are left out; images without a label are one class that may fill the sheet.

    Args:
        samples: uint8 [3, H, W], label (None: it has none) and name of each image.
        out: PNG to write or replace.

    Raises:
        OSError: `out` cannot be written.
    """
    rows: list[list[tuple[torch.Tensor, list[str]]]] = []
    kept = sorted(samples, key=lambda sample: -1 if sample[1] is None else sample[1])
    groups = [(label, list(found)) for label, found in groupby(kept, key=lambda s: s[1])]
    for label, found in groups[:CLASSES]:
        if len(groups) > 1:
            found = found[:PER_CLASS]
        number = "no label" if label is None else f"class {label}"
        tiles = [(pixels, [number, name]) for pixels, _, name in found[: PER_CLASS * CLASSES]]
        rows += [tiles[i : i + PER_CLASS] for i in range(0, len(tiles), PER_CLASS)]
    sheet(rows, out)


def sheet(rows: Sequence[Sequence[tuple[torch.Tensor, Sequence[str]]]], out: Path) -> None:
    """Write a PNG with rows of images and the lines of text under each.

    Many rows stand in several columns, so that the picture keeps the proportions of a screen.

    Args:
        rows: images, uint8 [3, H, W] of any size, with their lines of text.
        out: PNG to write or replace.

    Raises:
        OSError: `out` cannot be written.
    """
    import matplotlib  # its font has Latin, Greek, Cyrillic, Arabic and more

    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(file, _LINE - 3)
    lines = max((len(text) for row in rows for _, text in row), default=1)
    wide = max((len(row) for row in rows), default=1)  # number of images of a row
    step, down = _TILE + _GAP, _TILE + lines * _LINE + _GAP
    columns = max(1, round(math.sqrt(len(rows) * down / (wide * step))))
    height = -(-max(1, len(rows)) // columns)
    across = columns * (wide * step + 2 * _GAP) - 2 * _GAP
    canvas = Image.new("RGB", (across + _GAP, height * down + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        column, y = number // height, _GAP + number % height * down
        for place, (pixels, text) in enumerate(row):
            x = _GAP + column * (wide * step + 2 * _GAP) + place * step
            tile = _tile(pixels)
            canvas.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
            for i, line in enumerate(text):
                pen.text((x, y + _TILE + i * _LINE), _fitting(line, font), "#222222", font)
    stream = io.BytesIO()
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    canvas.save(stream, "PNG", pnginfo=info)
    write_atomically(out, stream.getvalue())


def _tile(pixels: torch.Tensor) -> Image.Image:
    """Bring an image, uint8 [3, H, W], to the size of a tile; its proportions stay."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return image.resize(size, how)


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a text to the width of a tile; its control characters and surrogates are escaped."""
    text = printable(text[: 2 * _TILE])
    if font.getlength(text) <= _TILE:
        return text
    while text and font.getlength(text + "…") > _TILE:
        text = text[:-1]
    return text + "…"
