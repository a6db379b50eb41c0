"""ADE20K's challenge set as a source: photographs, and a PNG with the class of each pixel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mae_scale.data.annotations import read_label_map
from mae_scale.data.formats import is_image_name
from mae_scale.data.shards import NO_LABEL
from mae_scale.errors import UserError
from mae_scale.files import read_file
from mae_scale.sharding.annotated import AnnotatedSource
from mae_scale.sharding.coco import image_size
from mae_scale.sharding.lists import read_text
from mae_scale.sharding.processes import run_all, shared

_FOLDERS = {"train": "training", "val": "validation"}
_NAMES = "objectInfo150.txt"


def find_ade(src: Path, split: str, workers: int = 1) -> AnnotatedSource | None:
    """List the images of a split in the challenge's layout; return None for another layout.

    The layout is ``{images,annotations}/{training,validation}``, alone or in a folder
    ``ADEChallengeData2016``, with the classes' names in ``objectInfo150.txt``. Without that file
    the classes are the numbers up to the largest one in the masks of both splits.

    Raises:
        UserError: the split is missing, an image has no mask, a mask has no image, or a mask has
            another size than its image or a value that is no class.
    """
    root = next(
        (
            folder
            for folder in (src, src / "ADEChallengeData2016")
            if (folder / "images").is_dir() and (folder / "annotations").is_dir()
        ),
        None,
    )
    if root is None or not any((root / "annotations" / f).is_dir() for f in _FOLDERS.values()):
        return None
    images, masks = (root / kind / _FOLDERS[split] for kind in ("images", "annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: the split {split} of {root}")
    stems = {p.stem: p for p in sorted(images.iterdir()) if is_image_name(p.name)}
    labels = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix.lower() == ".png"}
    alone = sorted(set(stems) ^ set(labels))
    if alone or not stems:
        has, lacks = (images, masks) if alone and alone[0] in stems else (masks, images)
        raise UserError(
            f"{alone[0]} is in {has} but not in {lacks} ({len(alone):,} such files)"
            if alone
            else f"{images} holds no images"
        )
    keys = sorted(stems)
    names = _class_names(root)
    pairs = [(str(stems[key]), str(labels[key])) for key in keys]
    if names is None:  # the shards of both splits must list the same classes
        others = (root / "annotations" / f for f in _FOLDERS.values() if f != _FOLDERS[split])
        pairs += [("", str(path)) for folder in others for path in sorted(folder.glob("*.png"))]
    largest = 0
    for found in run_all(_check, range(len(pairs)), workers, pairs):
        if isinstance(found, str):
            raise UserError(found)
        number, value = found
        largest = max(largest, value)
        if names is not None and value > len(names):
            raise UserError(
                f"{pairs[number][1]} holds the value {value}; {root / _NAMES} lists "
                f"{len(names)} classes, and 0 is none of them"
            )
    if largest == 0:
        raise UserError(f"{masks}: no pixel has a class; values begin at 1, and 0 is none")
    return AnnotatedSource(
        kind="ADE20K",
        root=root,
        classes=names or [str(number) for number in range(1, largest + 1)],
        labels=np.full(len(keys), NO_LABEL, np.int32),
        names=[str(stems[key].relative_to(root)) for key in keys],
        sizes=np.array([stems[key].stat().st_size for key in keys], np.int64),
        offsets=None,
        task="segmentation",
        keys=[_safe(key) for key in keys],
        annotation_sizes=np.array([labels[key].stat().st_size for key in keys], np.int64),
        objects=np.ones(len(keys), np.int32),
        annotations=[labels[key] for key in keys],
    )


def _check(number: int) -> tuple[int, int] | str:
    """Return number and largest value of a mask, or the text of an error; runs in a worker.

    The path of the image is "" if only the mask is to be checked.
    """
    image, mask = shared()[number]
    try:
        values = read_label_map(read_file(mask))
    except (ValueError, OSError) as error:
        return f"{mask} {error}"
    size = image_size(image) if image else None
    if size is not None and size != values.shape:
        return (
            f"{mask} is {values.shape[0]} x {values.shape[1]} pixels (height x width), its image "
            f"{os.path.basename(image)} is {size[0]} x {size[1]}"  # noqa: PTH119
        )
    return number, int(values[values != 255].max(initial=0))


def _class_names(root: Path) -> list[str] | None:
    """Read the names of the classes 1, 2, ... from the last column of the table."""
    if not (root / _NAMES).is_file():
        return None
    rows = read_text(root / _NAMES).strip().splitlines()[1:]
    return [row.split("\t")[-1].strip() for row in rows]


def _safe(key: str) -> str:
    if len(key) > 80 or not key.isascii() or "." in key:
        raise UserError(
            f"the name {key} cannot be a WebDataset key; expected up to 80 ASCII characters "
            "without a dot"
        )
    return key
