"""Shapes with exact masks, pasted on photographs, in the layouts of ADE20K and COCO.

Each image is a square piece of a photograph with one to four shapes on it: disks, squares and
triangles, turned at random, each filled with one colour. The hue of a shape lies within 40 degrees
of that of its kind, so that both colour and form tell the kinds apart. The photographs have the
same colours.
"""

from __future__ import annotations

import colorsys
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from photographs import TRAIN, VAL

KINDS = ("disk", "square", "triangle")
PHOTOGRAPH = len(KINDS) + 1  # value of the photograph in a label map


@dataclass
class Scene:
    """An image and the shapes that can be seen on it."""

    pixels: npt.NDArray[np.uint8]  # [S, S, 3]
    masks: list[npt.NDArray[np.bool_]]  # [S, S] each, without the pixels that other shapes cover
    kinds: list[int]  # positions in KINDS


def scenes(photographs: list[Path], count: int, size: int, seed: int) -> Iterator[Scene]:
    """Invent `count` scenes of `size` pixels; they follow from the seed."""
    generator = np.random.default_rng(seed)
    images = []
    for path in photographs:
        with Image.open(path) as opened:
            images.append(opened.convert("RGB"))
    y, x = np.mgrid[:size, :size] + 0.5
    for _ in range(count):
        photograph = images[generator.integers(len(images))]
        side = int(generator.integers(size, min(photograph.size) + 1))
        left = int(generator.integers(photograph.width - side + 1))
        top = int(generator.integers(photograph.height - side + 1))
        piece = photograph.crop((left, top, left + side, top + side)).resize((size, size))
        pixels = np.array(piece)
        owner = np.full((size, size), -1)
        kinds = [
            int(kind) for kind in generator.integers(len(KINDS), size=generator.integers(1, 5))
        ]
        for number, kind in enumerate(kinds):
            radius = generator.uniform(0.12, 0.28) * size
            cx, cy = generator.uniform(0.15, 0.85, 2) * size
            angle = generator.uniform(0, 2 * np.pi)
            u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
            v = -np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)
            inside = {
                "disk": u**2 + v**2 <= radius**2,
                "square": np.maximum(abs(u), abs(v)) <= 0.85 * radius,
                "triangle": (v <= radius / 2) & (abs(u) * 3**0.5 - radius <= v),
            }[KINDS[kind]]
            owner[inside] = number
            pixels[inside] = _color(kind, generator)
        masks = [owner == number for number in range(len(kinds))]
        seen = [number for number, mask in enumerate(masks) if mask.sum() >= 12]
        yield Scene(pixels, [masks[number] for number in seen], [kinds[n] for n in seen])


def _color(kind: int, generator: np.random.Generator) -> list[int]:
    hue = kind / len(KINDS) + generator.uniform(-1, 1) / 9
    rgb = colorsys.hsv_to_rgb(hue % 1, generator.uniform(0.5, 1), generator.uniform(0.4, 1))
    return [round(255 * value) for value in rgb]


def _splits(train: int, val: int) -> tuple[tuple[str, list[Path], int, int], ...]:
    return ("training", TRAIN, train, 1), ("validation", VAL, val, 2)


def write_ade(root: Path, train: int, val: int, size: int) -> None:
    """Write a folder in the layout of ADE20K: classes are the shapes, and the photograph."""
    for split, photographs, count, seed in _splits(train, val):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number, scene in enumerate(scenes(photographs, count, size, seed)):
            labels = np.full((size, size), PHOTOGRAPH, np.uint8)
            for mask, kind in zip(scene.masks, scene.kinds, strict=True):
                labels[mask] = kind + 1
            image = root / "images" / split / f"{number:05d}.jpg"
            Image.fromarray(scene.pixels).save(image, quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{number:05d}.png")
    rows = [f"{n}\t0\t0\t0\t{name}" for n, name in enumerate((*KINDS, "photograph"), start=1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))


def write_coco(root: Path, train: int, val: int, size: int) -> None:
    """Write a folder in the layout of COCO, masks as run lengths."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(KINDS, start=1)]
    for split, photographs, count, seed in _splits(train, val):
        folder = {"training": "train2017", "validation": "val2017"}[split]
        (root / folder).mkdir()
        images, annotations = [], []
        for number, scene in enumerate(scenes(photographs, count, size, seed)):
            name = f"{number:012d}.jpg"
            Image.fromarray(scene.pixels).save(root / folder / name, quality=95)
            images.append({"id": number, "file_name": name, "height": size, "width": size})
            for mask, kind in zip(scene.masks, scene.kinds, strict=True):
                packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": kind + 1,
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "bbox": rle.toBbox(packed).tolist(),
                        "segmentation": {"size": [size] * 2, "counts": packed["counts"].decode()},
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{folder}.json").write_text(json.dumps(content))
