"""COCO as a source: photographs, and one JSON file with the objects in them."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle

from mae_scale.data.formats import open_image
from mae_scale.data.shards import NO_LABEL
from mae_scale.errors import UserError
from mae_scale.files import open_file, read_file
from mae_scale.sharding.annotated import AnnotatedSource

_THREADS = 8  # number of threads that read the headers of images
_NAMED = 3  # number of missing images that an error names


def find_coco(src: Path, split: str, workers: int = 1) -> AnnotatedSource | None:
    """List the images of a split in COCO's layout; return None for another layout.

    The layout is ``annotations/instances_<name>.json`` beside a folder ``<name>`` of images, where
    the name begins with the split, such as ``train2017``.

    Raises:
        UserError: there are instances, but not of this split, or the images are missing.
    """
    every = sorted(src.glob("annotations/instances_*.json"))
    if not every:
        return None
    files = [path for path in every if path.stem.startswith(f"instances_{split}")]
    if len(files) != 1:
        found = ", ".join(path.name for path in files or every)
        raise UserError(
            f"{src}/annotations holds {found}; expected one file instances_{split}*.json. "
            "data_prep/shard_coco.py takes the file and the folder of images by name"
        )
    images = src / files[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise UserError(f"{files[0]} needs its images in {images}, which is no folder")
    return read_coco(files[0], images)


def read_coco(file: Path, folder: Path) -> AnnotatedSource:
    """List the images of a file of COCO instances, with the annotations of each.

    Args:
        file: COCO's JSON: `images`, `annotations` and `categories`.
        folder: folder with the images under their `file_name`.

    Raises:
        UserError: the file does not have this form, names missing images, or holds an annotation
            that cannot be right; the message names it.
    """
    content = _load(file)
    images, annotations, categories = (
        content[key] for key in ("images", "annotations", "categories")
    )
    names = {_integer(file, "category", c, "id"): c.get("name") for c in categories}
    for number, name in names.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: category {number} has the name {name!r}; expected text")
    if len(names) != len(categories) or not names:
        raise UserError(f"{file} lists {len(categories)} categories with {len(names)} ids")
    places = {_integer(file, "image", image, "id"): i for i, image in enumerate(images)}
    if len(places) != len(images) or not places:
        raise UserError(f"{file} lists {len(images)} images with {len(places)} ids")
    _check_images(file, folder, images)

    of_image: dict[int, list[int]] = defaultdict(list)
    objects = np.zeros(len(images), np.int32)
    seen: set[int] = set()
    cut = flat = crowds = 0
    for place, annotation in enumerate(annotations):
        number = _integer(file, "annotation", annotation, "id")
        where = f"{file}: annotation {number}"
        image_id, category = (
            _integer(file, f"annotation {number}", annotation, key)
            for key in ("image_id", "category_id")
        )
        image = places.get(image_id)
        if number in seen:
            raise UserError(f"{where} stands there twice")
        if image is None:
            raise UserError(f"{where} is of image {image_id}, not in the list")
        if category not in names:
            raise UserError(
                f"{where} has the category {category}; the list has "
                f"{len(names)} categories from {min(names)} to {max(names)}"
            )
        seen.add(number)
        height, width = images[image]["height"], images[image]["width"]
        x, y, w, h = _box(where, annotation, height, width)
        _check_segmentation(where, annotation, height, width)
        of_image[image].append(place)
        crowd, empty = annotation.get("iscrowd", 0), w == 0 or h == 0
        if crowd not in (0, 1):
            raise UserError(f"{where} has iscrowd {crowd!r}; expected 0 or 1")
        if not _numbers([annotation.get("area", 0)]):
            raise UserError(f"{where} has the area {annotation['area']!r}; expected pixels")
        objects[image] += not crowd and not empty
        crowds += crowd
        flat += empty and not crowd
        # COCO's own boxes reach outside by fractions of a pixel; these need no warning.
        cut += min(x, y) < -1 or x + w > width + 1 or y + h > height + 1

    order = sorted(range(len(images)), key=lambda i: images[i]["id"])
    records = [_record(images[i], i, annotations, of_image[i]) for i in order]
    # The objects that json.loads makes take ten times as much memory as the text.
    paths = [images[i]["file_name"] for i in order]
    ids = [images[i]["id"] for i in order]
    empty_images = int((objects == 0).sum())
    dataset = {key: value for key, value in content.items() if key not in _LISTS}
    warnings = [
        f"{file}: {count:,} {what}"
        for count, what in (
            (empty_images, "images without an object: training leaves them out"),
            (crowds, "crowd regions: training leaves them out"),
            (flat, "boxes without an area: training leaves them out"),
            (cut, "boxes that reach outside of their images: training cuts them"),
        )
        if count
    ]
    return AnnotatedSource(
        kind="COCO",
        root=folder,
        classes=[names[number] for number in sorted(names)],
        labels=np.full(len(order), NO_LABEL, np.int32),
        names=paths,
        sizes=np.array([(folder / path).stat().st_size for path in paths], np.int64),
        offsets=None,
        warnings=warnings,
        task="detection",
        keys=[f"{number:012d}" for number in ids],
        annotation_sizes=np.array([len(record) for record in records], np.int64),
        objects=objects[order],
        annotations=records,
        facts={"categories": categories, "dataset": dataset, "keys": list(content)},
    )


_LISTS = ("images", "annotations", "categories")
_MOST_BYTES = 1 << 33  # largest size of the JSON file


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_file(file, _MOST_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) and all(isinstance(e, dict) for e in content[key])
        for key in _LISTS
    ):
        raise UserError(f"{file} is no file of COCO instances: it needs lists of {_LISTS}")
    return content


def _integer(file: Path, what: str, entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{file}: {what} with {key} {value!r}; expected a whole number from 0 on")
    return value


def _check_images(file: Path, folder: Path, images: list[dict[str, Any]]) -> None:
    """Raise a UserError where an image is missing, or has another size than the file says."""
    for image in images:
        size = [image.get(key) for key in ("height", "width")]
        if not isinstance(image.get("file_name"), str) or not all(
            isinstance(n, int) and n > 0 for n in size
        ):
            raise UserError(
                f"{file}: image {image['id']} needs a file_name, a height and a width in pixels"
            )
        name = PurePosixPath(image["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{file}: image {image['id']} has a file_name that leaves {folder}")
    paths = [f"{folder}/{image['file_name']}" for image in images]
    missing = [Path(path).name for path in paths if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"{file} names {len(missing):,} of {len(images):,} images that are not in {folder}: "
            f"{', '.join(missing[:_NAMED])}{more}"
        )
    for image, size in zip(images, _each(image_size, paths), strict=True):
        if size is not None and size != (image["height"], image["width"]):
            raise UserError(
                f"{file}: image {image['id']} is {image['height']} x {image['width']} pixels "
                f"(height x width), but {image['file_name']} is {size[0]} x {size[1]}"
            )


def _each(function: Callable[[str], Any], paths: list[str]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, paths))


def image_size(path: str) -> tuple[int, int] | None:
    """Read height and width from a header; None if it is no image, which is found later."""
    try:
        with open_file(path) as file, open_image(file) as image:
            return image.height, image.width
    except Exception:  # PIL's readers raise errors of many kinds
        return None


def _box(where: str, annotation: dict[str, Any], height: int, width: int) -> list[float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box) or min(box[2:]) < 0:
        raise UserError(f"{where} has the box {box!r}; expected [x, y, width, height] in pixels")
    x, y, w, h = box
    if x >= width or y >= height or x + w < 0 or y + h < 0:
        raise UserError(
            f"{where} has the box {box}, outside of its image of {width} x {height} pixels "
            "(width x height)"
        )
    return box


def _numbers(values: list[Any]) -> bool:
    """Return whether all are finite numbers."""
    try:
        return all(not isinstance(v, bool) and math.isfinite(v) for v in values)
    except (TypeError, OverflowError):
        return False


def _check_segmentation(where: str, annotation: dict[str, Any], height: int, width: int) -> None:
    found = annotation.get("segmentation")
    if isinstance(found, dict):
        _check_runs(where, found.get("size"), found.get("counts"), height, width)
        return
    if not isinstance(found, list) or not found:
        raise UserError(f"{where} has no segmentation; expected polygons or run lengths")
    for polygon in found:
        if not isinstance(polygon, list) or len(polygon) % 2 or not _numbers(polygon):
            raise UserError(f"{where} has a polygon that is no list of x, y, x, y, ...")
        if len(polygon) < 6:
            raise UserError(f"{where} has a polygon of {len(polygon) // 2} points; it needs 3")


def _check_runs(where: str, size: Any, counts: Any, height: int, width: int) -> None:
    """Raise a UserError unless run lengths, as numbers or compressed to text, fill the image."""
    if size != [height, width]:
        raise UserError(
            f"{where} has a mask of {size} pixels (height, width), its image has {[height, width]}"
        )
    if isinstance(counts, str):
        try:
            rle.decode({"size": size, "counts": counts})
            return
        except ValueError:
            pass
    elif (
        isinstance(counts, list)
        and all(isinstance(n, int) and n >= 0 for n in counts)
        and sum(counts) == height * width
    ):
        return
    raise UserError(f"{where} has a mask whose run lengths do not add up to its size")


def _record(
    image: dict[str, Any], place: int, annotations: list[dict[str, Any]], own: list[int]
) -> bytes:
    """Encode the record that goes beside an image into the shard.

    Its `annotations` are those of the file. From `image` and the places in the file's lists,
    `data.annotations.coco_file` can rebuild the file.
    """
    record = {
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "license": image.get("license"),
        "annotations": [annotations[i] for i in own],
        "image": image,
        "place": place,
        "places": own,
    }
    return json.dumps(record).encode()
