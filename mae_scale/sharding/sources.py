"""Sources of images: ImageNet in its usual forms, or any folder of images.

`find_source` looks at a folder and lists the images of one split, without unpacking or copying:

- the official archives, ``ILSVRC2012_img_train.tar`` (tars inside a tar) or
  ``ILSVRC2012_img_val.tar`` with the devkit: headers are read by seeking, images by offset;
- the Kaggle layout, and folders of class folders, with or without splits above them (`layouts`);
- folders with one tar for each class;
- Hugging Face's parquet files and compressed tars, which are unpacked beside the shards (`packed`).

The same images in another form give the same list, so they give the same shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_scale.data.formats import IMAGE_SUFFIXES, is_image_name
from mae_scale.errors import UserError
from mae_scale.randomness import hash64
from mae_scale.sharding.imagenet import (
    base_of,
    compare_with_imagenet,
    stem_of,
    train_archive,
    val_archive,
)
from mae_scale.sharding.labels import number_by
from mae_scale.sharding.layouts import KAGGLE_TREES, from_folder, split_word
from mae_scale.sharding.listing import Entry, Source, sorted_source
from mae_scale.sharding.packed import find_packed, from_packed
from mae_scale.sharding.processes import run_all
from mae_scale.sharding.tars import walk_tar

__all__ = ["Choice", "Source", "find_source"]

_SPLIT_SALT = 0x5EED  # separates this use of the seed from all others


@dataclass(frozen=True)
class Choice:
    """Choice of the images of a source, and of their classes."""

    list_file: str | Path | None = None  # see `read_list`
    classes: Sequence[str] | None = None  # only these, numbered in this order
    class_depth: int | None = None  # folders of a path that are the class; None: found by looking
    val_share: float | None = None  # part of each class for val, if the source has no splits
    seed: int = 0  # seed of that split


def find_source(
    src: str | Path,
    split: str,
    workers: int = 1,
    choice: Choice | None = None,
    work: Path | None = None,
) -> Source:
    """List the images of `split` ("train" or "val") in `src`.

    Args:
        work: folder into which packed sources are unpacked; None: these are refused.

    Raises:
        UserError: `src` does not exist, lacks the split, holds no images, or cannot be understood.
    """
    src, choice = Path(src), choice or Choice()
    if not src.exists():
        raise UserError(f"{src} does not exist")
    if not src.is_dir():
        raise UserError(
            f"{src} is not a folder; give the folder that holds the archives or the class folders"
        )
    source, has_splits = _look(src, split, workers, choice, work)
    if not len(source):
        raise UserError(
            f"{source.root} holds no images (looked for .{', .'.join(sorted(IMAGE_SUFFIXES))})"
        )
    if choice.val_share is not None:
        if has_splits:
            raise UserError(f"{src} has splits of its own; there is nothing to split")
        source = _part(source, split, choice.val_share, choice.seed)
    if choice.classes is not None:
        source = _with_classes(source, choice.classes)
    elif choice.list_file is None:
        compare_with_imagenet(source, split)
    if not has_splits or choice != Choice():
        names = ", ".join(source.classes[:3]) + (", …" if len(source.classes) > 3 else "")
        every = "all " if not has_splits and choice == Choice() else ""
        source.taken = (
            f"{every}{len(source):,} images as {split}; {len(source.classes):,} classes: {names}"
        )
    if len(source.classes) == 1 and not any("'images'" in line for line in source.warnings):
        source.warnings.append(
            f"all images are of one class, {source.classes[0]}: nothing can be classified"
        )
    return source


def _look(
    src: Path, split: str, workers: int, choice: Choice, work: Path | None
) -> tuple[Source, bool]:
    """Find the source, and whether it has splits of its own."""
    archive = src / f"ILSVRC2012_img_{split}.tar"
    if archive.is_file():
        return (train_archive if split == "train" else val_archive)(archive, workers), True
    packed = find_packed(src, split)
    if packed:
        if work is None:
            raise UserError(f"{src} holds packed images ({packed[0].name})")
        return from_packed(packed, src, work), True
    tars = _class_tars(src, split)
    if tars:
        return _from_tars(tars, workers), tars[0].parent != src
    other = [path.name for path in src.glob("ILSVRC2012_img_*.tar")]
    kaggle = any((src / tree).is_dir() for tree in KAGGLE_TREES)
    if (
        other
        and not kaggle
        and not any(p.is_dir() and split_word(p.name)[0] for p in src.iterdir())
    ):
        raise UserError(f"{src} has {', '.join(other)} but no {archive.name}")
    return from_folder(src, split, choice.class_depth, choice.list_file)


# A tar for each class


def _class_tars(src: Path, split: str) -> list[Path]:
    """Return the tars of classes in a folder, or in that of the split; none if there are others."""
    folders = [p for p in sorted(src.iterdir()) if p.is_dir() and p.name[0] != "."]
    for folder in (src, *(p for p in folders if split_word(p.name) == (split, True))):
        tars = sorted(p for p in folder.glob("*.tar") if p.name[0] != ".")
        tars = [p for p in tars if not p.name.startswith("ILSVRC2012_")]
        if len(tars) > 1 or (tars and not any(p.is_dir() for p in folder.iterdir())):
            return tars
    return []


def _from_tars(tars: Sequence[Path], workers: int) -> Source:
    listed = dict(run_all(_list_tar, list(enumerate(map(str, tars))), workers))
    entries: list[Entry] = []
    empty = []
    for number, tar in enumerate(tars):
        images, labels = listed[number]
        if labels:
            raise UserError(
                f"{tar} holds labels ({labels}): it is a WebDataset tar and not the tar of a "
                f"class; use `mae-scale index {tar.parent}` instead"
            )
        entries += images
        if not images:
            empty.append(tar.name)
    source = sorted_source("tars of classes", tars[0].parent, entries)
    source.archives = list(tars)
    if empty:
        source.warnings.append(f"{len(empty):,} tars hold no images, such as {empty[0]}")
    return source


def _list_tar(task: tuple[int, str]) -> tuple[int, tuple[list[Entry], str]]:
    number, path = task
    name = stem_of(path)
    entries, labels = [], ""
    for m in walk_tar(Path(path)):
        if is_image_name(m.name):
            entries.append(Entry(name, f"{name}/{base_of(m.name)}", m.size, m.offset, number))
        elif m.name.endswith((".cls", ".json")) and not base_of(m.name).startswith("."):
            labels = labels or m.name
    return number, (entries, labels)


# A choice of the images


def _take(source: Source, which: np.ndarray, classes: list[str], labels: np.ndarray) -> Source:
    """Keep the images at some places of a source, with other labels."""
    order = np.lexsort((which, labels))
    which, labels = which[order], labels[order]
    source.names = [source.names[i] for i in which.tolist()]
    source.sizes, source.labels, source.classes = source.sizes[which], labels, classes
    for name in ("offsets", "archive_of"):
        values = getattr(source, name)
        setattr(source, name, None if values is None else values[which])
    return source


def _part(source: Source, split: str, share: float, seed: int) -> Source:
    """Keep the train or the val part of each class; the same seed gives both parts."""
    keep = np.zeros(len(source), bool)
    for label in range(len(source.classes)):
        places = np.flatnonzero(source.labels == label)
        shuffled = places[np.argsort(hash64(_SPLIT_SALT, seed, label, np.arange(len(places))))]
        count = round(share * len(places))
        keep[shuffled[:count] if split == "val" else shuffled[count:]] = True
    which = np.flatnonzero(keep)
    if not len(which):
        raise UserError(f"{source.root}: the share {share:g} leaves no images for {split}")
    return _take(source, which, source.classes, source.labels[which])


def _with_classes(source: Source, classes: Sequence[str]) -> Source:
    """Keep the images of some classes, numbered in the order of these."""
    there = {source.classes[label] for label in np.unique(source.labels).tolist()}
    known = there & set(classes)
    if not known:
        # Numbers as labels of a list are places among the classes.
        number = number_by(classes, there)
    else:
        number = {name: i for i, name in enumerate(classes) if name in there}
    place = np.array([number.get(name, -1) for name in source.classes], np.int32)
    labels = place[source.labels]
    which = np.flatnonzero(labels >= 0)
    missing = [name for i, name in enumerate(classes) if i not in set(labels[which].tolist())]
    if missing:
        source.warnings.append(
            f"{len(missing):,} of {len(classes):,} classes have no images, such as {missing[0]}"
        )
    return _take(source, which, list(classes), labels[which])
