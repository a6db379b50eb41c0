"""Photographs to try mae-scale with, as ImageFolder trees of pieces of them.

    python examples/photographs.py OUT [FOLDER]

writes OUT/train/<photograph>/*.jpg, overlapping square pieces; OUT/test/<photograph>/*.jpg, smaller
pieces of the same photographs; and OUT/val/<photograph>/*.jpg, pieces of others. They come from
FOLDER, or else from packages that ship some under free licences: scikit-image (public domain and
CC0, `skimage.data` names each source), scikit-learn (china and flower, CC BY 2.0, danielbuechele
and vultilion on Flickr) and matplotlib (grace_hopper, public domain, U.S. Navy).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import skimage
import sklearn
from PIL import Image

from mae_scale.errors import UserError

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
TRAIN = [
    SKIMAGE / "astronaut.png",
    SKIMAGE / "camera.png",
    SKIMAGE / "coffee.png",
    SKIMAGE / "motorcycle_left.png",
    SKIMAGE / "coins.png",
    SKIMAGE / "retina.jpg",
    SKIMAGE / "rocket.jpg",
    SKLEARN / "china.jpg",
    SKLEARN / "flower.jpg",
    Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
]
VAL = [SKIMAGE / "chelsea.png"]
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MOST = 100  # most photographs of the user's to take


def pieces(photograph: Path, side: int, stride: int) -> Iterator[Image.Image]:
    """Cut square pieces of `side` pixels, `stride` apart, out of a photograph scaled to 448
    pixels."""
    with Image.open(photograph) as opened:
        image = opened.convert("RGB")
    scale = 448 / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    for top in range(0, image.height - side + 1, stride):
        for left in range(0, image.width - side + 1, stride):
            yield image.crop((left, top, left + side, top + side))


def write_photographs(train: list[Path], val: list[Path], out: Path) -> None:
    """Write the trees; `out` appears only when it is whole.

    Raises:
        UserError: no photograph can be read.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    written = 0
    for split, photographs, side, stride in (
        ("train", train, 384, 32),
        ("test", train, 256, 192),
        ("val", val, 384, 32),
    ):
        for place, photograph in enumerate(photographs):
            folder = unfinished / split / f"{place:03d}-{photograph.stem}"
            folder.mkdir(parents=True)
            try:
                for number, piece in enumerate(pieces(photograph, side, stride)):
                    piece.save(folder / f"{photograph.stem}-{number:03d}.jpg", quality=92)
                    written += 1
            except (OSError, ValueError, SyntaxError) as error:
                if split != "test":  # the same as in train
                    print(f"left out: {photograph} cannot be read ({error})", file=sys.stderr)
                shutil.rmtree(folder)
    if not written:
        shutil.rmtree(unfinished)
        raise UserError(f"none of {len(train) + len(val)} images can be read")
    unfinished.rename(out)


def write_sample_photographs(out: Path) -> None:
    """Write the trees of the photographs that packages ship."""
    write_photographs(TRAIN, VAL, out)


def write_own_photographs(folder: Path, out: Path) -> None:
    """Write the trees of the photographs in a folder of the user's; every eighth goes to val.

    Raises:
        UserError: there is no such folder, it holds no images, or none that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGES)})")
    files = files[:: -(-len(files) // MOST)]
    val = files[7::8] or files[-1:]
    train = [file for file in files if file not in val] or files
    write_photographs(train, val, out)


if __name__ == "__main__":
    try:
        if len(sys.argv) > 2:
            write_own_photographs(Path(sys.argv[2]), Path(sys.argv[1]))
        else:
            write_sample_photographs(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"photographs: {error}")
