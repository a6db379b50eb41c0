"""Datasets whose splits or labels lie in files of their own form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import base_of
from mae_scale.sharding.labels import normal
from mae_scale.sharding.listing import Source, list_images, sorted_source
from mae_scale.sharding.lists import read_text
from mae_scale.sharding.matching import take_list

_NAMES = (
    "tiny-imagenet-200", "food-101", "oxford-iiit-pet", "CUB_200_2011", "flowers-102",
    "fgvc-aircraft-2013b",
)  # fmt: skip


def find_known(src: Path, split: str) -> Source | None:
    """List the images of a split of a dataset known by its files; return None for anything else.

    Raises:
        UserError: the dataset's files are damaged, or there are several datasets.
    """
    inside = [src / name for name in _NAMES if (src / name).is_dir()]
    if len(inside) > 1:
        raise UserError(
            f"{src} holds several datasets: {', '.join(p.name for p in inside)}; give one as SRC"
        )
    for root in [*covers(src), *inside]:
        for read in _READERS:
            source = read(root, split)
            if source is not None:
                return source
    return None


def covers(src: Path) -> list[Path]:
    """List a folder, its only subfolder and so on, as unpacked archives have them; at most five."""
    chain = [src]
    while len(chain) < 5:
        inside = [p for p in chain[-1].iterdir() if p.is_dir() and p.name[0] not in "._"]
        if len(inside) != 1 or inside[0].is_symlink():
            break
        chain.append(inside[0])
    return chain


def _tiny_imagenet(root: Path, split: str) -> Source | None:
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        return None
    if split == "train":
        images = list_images(root / "train").images
        class_of = {e.name: e.name.partition("/")[0] for e in images if "/" in e.name}
        return _labelled(root / "train", "Tiny ImageNet", class_of, root / "train")
    return _labelled(root / "val", "Tiny ImageNet", {r[0]: r[1] for r in _rows(table, 2)}, table)


def _food(root: Path, split: str) -> Source | None:
    table = root / "meta" / {"train": "train.txt", "val": "test.txt"}[split]
    if not (table.is_file() and (root / "images").is_dir()):
        return None
    return take_list(list_images(root / "images"), root / "images", table, 1)


def _pets(root: Path, split: str) -> Source | None:
    table = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
    if not (table.is_file() and (root / "images").is_dir()):
        return None
    names = [row[0] for row in _rows(table, 1)]
    class_of = {f"{name}.jpg": name.rpartition("_")[0] for name in names}
    return _labelled(root / "images", "Oxford-IIIT Pets", class_of, table)


def _cub(root: Path, split: str) -> Source | None:
    table = root / "train_test_split.txt"
    if not (table.is_file() and (root / "images.txt").is_file() and (root / "images").is_dir()):
        return None
    path_of = dict(_rows(root / "images.txt", 2))
    wanted = {"train": "1", "val": "0"}[split]
    paths = [path_of[n] for n, part in _rows(table, 2) if part == wanted and n in path_of]
    class_of = {path: path.partition("/")[0] for path in paths}
    return _labelled(root / "images", "CUB-200-2011", class_of, table)


def _aircraft(root: Path, split: str) -> Source | None:
    for data in (root, root / "data"):
        table = data / f"images_variant_{split}.txt"
        if table.is_file() and (data / "images").is_dir():
            return take_list(list_images(data / "images"), data / "images", table)
    return None


def _flowers(root: Path, split: str) -> Source | None:
    labels, splits = root / "imagelabels.mat", root / "setid.mat"
    if not (labels.is_file() and splits.is_file() and (root / "jpg").is_dir()):
        return None
    label_of = _matrix(labels, "labels")
    numbers = _matrix(splits, {"train": "trnid", "val": "valid"}[split])
    if not len(label_of) or numbers.min(initial=1) < 1 or numbers.max(initial=0) > len(label_of):
        raise UserError(f"{splits} names images that {labels} has no label for")
    class_of = {f"image_{n:05d}.jpg": str(label_of[n - 1]) for n in numbers.tolist()}
    classes = [str(n) for n in range(1, int(label_of.max()) + 1)]
    return _labelled(root / "jpg", "Flowers-102", class_of, splits, classes)


_READERS: tuple[Callable[[Path, str], Source | None], ...] = (
    _tiny_imagenet, _food, _pets, _cub, _aircraft, _flowers,
)  # fmt: skip


def _rows(table: Path, columns: int) -> list[list[str]]:
    """Return the first `columns` columns of all lines that have at least so many."""
    rows = [line.split() for line in read_text(table).splitlines() if line[:1] != "#"]
    return [row[:columns] for row in rows if len(row) >= columns]


def _matrix(file: Path, name: str) -> Any:
    """Read a row of numbers from a Matlab file."""
    from scipy.io import loadmat

    try:
        return np.atleast_1d(np.asarray(loadmat(file)[name]).squeeze()).astype(np.int64)
    except Exception as error:  # scipy's readers raise errors of many classes
        raise UserError(f"{file} cannot be read: {error}") from None


def _labelled(
    folder: Path,
    kind: str,
    class_of: dict[str, str],
    table: Path,
    classes: list[str] | None = None,
) -> Source:
    """List the images of a folder that a table names, by their paths or their file names."""
    entries = []
    for entry in list_images(folder).images:
        class_name = class_of.get(entry.name) or class_of.get(base_of(entry.name))
        if class_name is not None:
            entries.append(entry._replace(class_name=normal(class_name)))
    source = sorted_source(kind, folder, entries, classes)
    if missing := len(class_of) - len(entries):
        source.warnings.append(f"{missing:,} images that {table} names are not in {folder}")
    return source
