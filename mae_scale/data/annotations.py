"""Reading the annotation files in shards: objects of COCO, label maps of ADE20K."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from mae_scale.data.cache import ShardCache
from mae_scale.data.formats import MAX_PIXELS, TooLarge, open_image
from mae_scale.data.reader import ShardReader
from mae_scale.data.shards import ShardSet, read_manifest
from mae_scale.errors import UserError

IGNORE = 255  # value in a label map: the pixel is not counted
_FAR = 4  # largest distance of a polygon's points, in lengths of the image's longer side
_LONGEST = 1_000_000  # largest number of pixels of a polygon's outline


@dataclass
class Objects:
    """The objects of one image that can be trained on: no crowd regions, none without area."""

    categories: npt.NDArray[np.int64]  # [n], COCO's category ids
    shapes: list[Any]  # [n], each run lengths, or polygons [[x, y, x, y, ...], ...] in pixels


def read_record(data: bytes | bytearray) -> dict[str, Any]:
    """Parse the JSON beside an image of COCO.

    Raises:
        ValueError: it is damaged.
    """
    try:
        record = json.loads(data)
        if not isinstance(record["annotations"], list):
            raise ValueError("annotations are no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"holds no annotations of COCO ({error})") from error
    return record


def objects_of(record: dict[str, Any], height: int, width: int) -> Objects:
    """Return the objects of a record that can be trained on.

    Args:
        height, width: pixels of the image.

    Raises:
        ValueError: an object does not have COCO's form, or its shape cannot lie in this image.
    """
    try:
        kept = [
            annotation
            for annotation in record["annotations"]
            if not annotation.get("iscrowd", 0) and min(map(float, annotation["bbox"][2:])) > 0
        ]
        categories = np.array([annotation["category_id"] for annotation in kept], np.int64)
        shapes = [annotation["segmentation"] for annotation in kept]
        for shape in shapes:
            _check_shape(shape, height, width)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"holds an object that is none of COCO's ({error!s:.200})") from None
    return Objects(categories, shapes)


def _check_shape(shape: Any, height: int, width: int) -> None:
    """Raise a ValueError where drawing a shape would take more memory or time than its image."""
    if isinstance(shape, dict):
        counts = shape["counts"]
        if list(shape["size"]) != [height, width]:
            raise ValueError(f"a mask of {shape['size']} pixels, the image has {[height, width]}")
        if not isinstance(counts, str):
            runs = np.array(counts, np.int64)
            if runs.ndim != 1 or (runs < 0).any() or int(runs.sum()) != height * width:
                raise ValueError("a mask whose run lengths do not add up to its size")
        elif not counts.isascii():
            raise ValueError("a mask whose run lengths are no text of COCO's")
        return
    if not isinstance(shape, list) or not shape:
        raise ValueError("neither polygons nor run lengths")
    for polygon in shape:
        points = np.array(polygon, np.float64)
        if points.ndim != 1 or len(points) % 2 or len(points) < 6:
            raise ValueError("a polygon that is no list of x, y, x, y, ...")
        points = points.reshape(-1, 2)
        if not (np.abs(points) <= _FAR * max(height, width)).all():  # also false for NaN
            raise ValueError("a polygon far outside of its image")
        if np.abs(np.diff(points, axis=0)).sum() > _LONGEST:
            raise ValueError("a polygon whose outline is too long")


def read_label_map(data: bytes | bytearray, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Read a PNG that gives each pixel a class, uint8 [H, W]; a palette is ignored.

    Args:
        max_pixels: a larger image is refused by its header, before it takes memory.

    Raises:
        ValueError: the data are no such image, or one that is too large.
    """
    try:
        with open_image(data, max_pixels) as image:
            mode, values = image.mode, np.array(image)
    except TooLarge:
        raise
    except Exception as error:  # PIL passes on all errors of its decoders
        raise ValueError(f"cannot be decoded ({error})") from error
    if mode not in ("L", "P"):
        raise ValueError(
            f"has pixels of mode {mode}; expected one byte a pixel, the number of its class"
        )
    return values


def shape_mask(shape: Any, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Rasterise a shape as pycocotools does: 0 or 1 for each pixel, uint8 [height, width].

    Args:
        shape: polygons, or run lengths of exactly this size, as numbers or compressed to text.
    """
    if isinstance(shape, dict):
        packed = shape if isinstance(shape["counts"], str | bytes) else None
        return rle.decode(packed or rle.frPyObjects(shape, height, width))
    return rle.decode(rle.merge(rle.frPyObjects(shape, height, width)))


def box_within(
    polygons: list[npt.NDArray[np.float64]], x0: float, y0: float, x1: float, y1: float
) -> tuple[float, float, float, float] | None:
    """Return the bounding box of the part of polygons in a rectangle; None if it is empty.

    The extreme points of that part are ends of the polygons' edges, cut to the rectangle, or
    corners of the rectangle that lie inside a polygon.

    Args:
        polygons: float64 [k, 2] each, x and y in pixels.
        x0, y0, x1, y1: sides of the rectangle, in pixels.

    Returns:
        The sides x0, y0, x1, y1 of the box, in pixels.
    """
    points = []
    corners = np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]])
    for polygon in polygons:
        if (polygon >= (x0, y0)).all() and (polygon <= (x1, y1)).all():
            points.append(polygon)
            continue
        start, end = polygon, np.roll(polygon, -1, axis=0)
        step = end - start
        first, last = np.zeros(len(polygon)), np.ones(len(polygon))
        for axis, (low, high) in enumerate(((x0, x1), (y0, y1))):
            along = step[:, axis]
            with np.errstate(divide="ignore", invalid="ignore"):
                a, b = (low - start[:, axis]) / along, (high - start[:, axis]) / along
            inside = (start[:, axis] >= low) & (start[:, axis] <= high)
            still = along == 0
            first = np.maximum(first, np.where(still, np.where(inside, 0, 2), np.minimum(a, b)))
            last = np.minimum(last, np.where(still, np.where(inside, 1, -1), np.maximum(a, b)))
        hit = first <= last
        for t in (first, last):
            points.append((start + t[:, None] * step)[hit])
        points.append(corners[[_contains(polygon, corner) for corner in corners]])
    found = np.concatenate(points) if points else np.zeros((0, 2))
    if not len(found):
        return None
    (left, top), (right, bottom) = found.min(axis=0), found.max(axis=0)
    return (
        float(max(left, x0)), float(max(top, y0)), float(min(right, x1)), float(min(bottom, y1))
    )  # fmt: skip


def _contains(polygon: npt.NDArray[np.float64], point: npt.NDArray[np.float64]) -> bool:
    """Return whether a ray from the point to the right crosses an odd number of edges."""
    x, y = point
    start, end = polygon, np.roll(polygon, -1, axis=0)
    over = (start[:, 1] > y) != (end[:, 1] > y)
    start, end = start[over], end[over]
    at = start[:, 0] + (y - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end[:, 0] - start[:, 0])
    return bool((at > x).sum() % 2)


def read_records(shards: ShardSet, cache: ShardCache | None = None) -> list[dict[str, Any]]:
    """Read the JSON of each sample of COCO shards, in the order of the samples.

    Raises:
        UserError: a record is damaged, or these are no shards of COCO.
    """
    if shards.task != "detection":
        raise UserError(f"{shards.root} holds no objects; make it with data_prep/shard_coco.py")
    reader = ShardReader(shards, cache)
    records = []
    for sample in range(len(shards)):
        reader.prepare(np.array([sample]))
        member = reader.read_annotation(sample)
        try:
            records.append(read_record(member.data))
        except ValueError as error:
            raise UserError(f"{shards.root}: {member.name} {error}") from None
    reader.close()
    return records


def coco_file(shards: ShardSet) -> dict[str, Any]:
    """Rebuild COCO's file of instances, as `json.load` returns it, from the shards of a folder.

    It equals the file from which the shards were made, unless damaged images were left out.

    Raises:
        UserError: these are no shards of COCO, or a file in them is damaged.
    """
    records = sorted(read_records(shards), key=lambda record: record["place"])
    annotations = sorted(
        (pair for r in records for pair in zip(r["places"], r["annotations"], strict=True)),
        key=lambda pair: pair[0],
    )
    manifest = read_manifest(Path(shards.root))
    content = {
        **manifest.get("dataset", {}),
        "images": [record["image"] for record in records],
        "annotations": [annotation for _, annotation in annotations],
        "categories": list(shards.categories),
    }
    return {key: content[key] for key in manifest["keys"]}
