"""Sources of images: ImageNet in its usual forms, or any folder of images.

`find_source` lists the images of one split in a folder, without unpacking or copying them:

- the official archives, ``ILSVRC2012_img_train.tar`` (tars inside a tar) or
  ``ILSVRC2012_img_val.tar`` with the devkit: headers are read by seeking, images by offset;
- the Kaggle layout, and folders of class folders, with or without splits above them (`layouts`);
- tars of classes, of splits, or of everything (`archives`); compressed tars are unpacked beside
  the shards;
- Hugging Face's parquet files, which are unpacked as well (`parquet`).

The same images in another form give the same list, so they give the same shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_scale.data.formats import ARRAY_SUFFIX, IMAGE_SUFFIXES
from mae_scale.data.remote import printable
from mae_scale.errors import UserError
from mae_scale.files import owner
from mae_scale.randomness import hash64
from mae_scale.sharding.archives import (
    find_archives,
    holds_images,
    is_compressed,
    other_archives,
    read_archives,
    stem_of_tar,
)
from mae_scale.sharding.imagenet import compare_with_imagenet, train_archive, val_archive
from mae_scale.sharding.known import covers
from mae_scale.sharding.labels import number_by
from mae_scale.sharding.layouts import KAGGLE_TREES, from_folder, from_listing
from mae_scale.sharding.listing import Choice, Source, sorted_source
from mae_scale.sharding.matching import numbered
from mae_scale.sharding.parquet import find_parquet, read_parquet
from mae_scale.sharding.words import split_word

__all__ = ["Choice", "Source", "find_source"]

_SPLIT_SALT = 0x5EED  # keeps this use of the seed apart from all others


def find_source(
    src: str | Path,
    split: str,
    workers: int = 1,
    choice: Choice | None = None,
    work: Path | None = None,
) -> Source:
    """List the images of `split` ("train" or "val") in `src`.

    Args:
        src: folder with images, folders of images, or archives.
        split: "train" or "val".
        workers: number of processes that read archives.
        choice: images to take, and their classes; None: all images, classes by looking.
        work: folder into which packed sources are unpacked; None: these are refused.

    Raises:
        UserError: `src` does not exist, lacks the split, holds no images, or has an unclear layout.
    """
    src, choice = Path(src), choice or Choice()
    if not src.exists():
        raise UserError(f"{src} does not exist")
    if not src.is_dir():
        raise UserError(
            f"{src} is not a folder; give the folder that holds the archives or the class folders"
        )
    source, has_splits = _look(src, split, workers, choice, work)
    if unread := [name for name in other_archives(src) if not _readable(name)]:
        source.warnings.append(f"not read: {', '.join(unread[:3])}; unpack them first")
    if not len(source):
        packed = f"; unpack {', '.join(other[:3])} first" if (other := other_archives(src)) else ""
        raise UserError(
            f"{source.root} holds no images (looked for .{', .'.join(sorted(IMAGE_SUFFIXES))})"
            f"{packed}"
        )
    _refuse_stacks(source)
    if choice.val_share is not None:
        if has_splits:
            raise UserError(
                f"{src} has splits of its own; to split one of them, give its folder as SRC"
            )
        source = _part(source, split, choice.val_share, choice.seed)
    if choice.classes is not None:
        source = _with_classes(source, choice.classes)
    elif choice.list_file is None:
        compare_with_imagenet(source, split)
    if not has_splits or choice != Choice():
        names = ", ".join(map(printable, source.classes[:3])) + (
            ", …" if len(source.classes) > 3 else ""
        )
        every = "all " if not has_splits and choice == Choice() else ""
        source.taken = (
            f"{every}{len(source):,} images as {split}; {len(source.classes):,} classes: {names}"
        )
    if len(source.classes) == 1 and not any("'images'" in line for line in source.warnings):
        source.warnings.append(
            f"all images are of one class, {source.classes[0]}: nothing can be classified"
        )
    return source


def _refuse_stacks(source: Source) -> None:
    """Raise a UserError for arrays that hold many images, or the labels of many, in one file."""
    arrays = [name for name in source.names if name.lower().endswith(ARRAY_SUFFIX)][:20]
    for name in arrays if source.offsets is None else ():
        try:
            shape = np.load(source.root / name, mmap_mode="r").shape
        except (OSError, ValueError):
            continue  # damage is reported when the array is read
        many = len(shape) == 3 and shape[0] > 1000 and shape[1] == shape[2]
        if len(shape) in (1, 4) or many:
            raise UserError(
                f"{source.root / name} holds an array of shape {list(shape)}, which is not one "
                "image; write each image of it as a file below a folder of its class"
            )


def _readable(name: str) -> bool:
    return name.lower().endswith(".tar") or is_compressed(Path(name))


def _look(
    src: Path, split: str, workers: int, choice: Choice, work: Path | None
) -> tuple[Source, bool]:
    """Find the source, and return whether it has splits of its own."""
    archive = src / f"ILSVRC2012_img_{split}.tar"
    if archive.is_file() and choice.list_file is None:
        return (train_archive if split == "train" else val_archive)(archive, workers), True
    packed = _packed(src, split, workers, choice, work)
    if packed is not None:
        return packed
    other = [path.name for path in src.glob("ILSVRC2012_img_*.tar")]
    kaggle = any((folder / tree).is_dir() for folder in covers(src) for tree in KAGGLE_TREES)
    if (
        other
        and not kaggle
        and choice.list_file is None
        and not any(p.is_dir() and split_word(p.name)[0] for p in src.iterdir())
    ):
        raise UserError(f"{src} has {', '.join(other)} but no {archive.name}")
    return from_folder(src, split, choice)


def _packed(
    src: Path, split: str, workers: int, choice: Choice, work: Path | None
) -> tuple[Source, bool] | None:
    """Find the images in parquet files or tars; return None if there are none."""
    if holds_images(src):
        # Unpacked images come before the archive beside them, unless only the archive has the
        # split.
        folders = [p for p in src.iterdir() if p.is_dir() and split_word(p.name) == (split, True)]
        tars = [p for p in src.glob("*.tar*") if split_word(stem_of_tar(p)) == (split, True)]
        if folders and not any(holds_images(folder, itself=True) for folder in folders):
            tars = find_archives(src, split)  # the tars of classes, from ImageNet's archive
        elif folders:
            return None
        if not tars:
            return None
        files: list[Path] = []
        named = False
    else:
        files, named = find_parquet(src, split)
        tars = []
        for folder in covers(src) if not files else ():
            tars = tars or find_archives(folder, split)
    if not files and not tars:
        return None
    spooled = bool(files) or any(map(is_compressed, tars))
    if spooled and work is None:
        raise UserError(f"{src} holds packed images ({(files or tars)[0].name})")
    spool = Path()
    classes = None
    if spooled and work is not None:
        work.mkdir(parents=True, exist_ok=True)
        spool = work / f"unpacked.{owner()}.tmp"
        with spool.open("wb") as stream:
            if files:
                listing, classes = read_parquet(files, stream)
            else:
                listing = read_archives(tars, src, workers, stream, choice.sure)
    else:
        listing = read_archives(tars, src, workers, None, choice.sure)
    if not listing.images:
        names = ", ".join(path.name for path in tars[:3])
        raise UserError(f"{src} holds no images: there are none in {names}")
    if files and choice.list_file is None:
        source = sorted_source(
            "parquet files", spool, listing.images, classes or numbered(listing.images)
        )
        has_splits = named
    else:
        source, has_splits = from_listing(listing, src, "tars", split, choice)
    source.warnings += listing.notes
    source.archives = [*tars, *([spool] if spooled else [])]
    return source, has_splits


# Taking a part of the images


def _take(source: Source, which: np.ndarray, classes: list[str], labels: np.ndarray) -> Source:
    """Keep the images at the places `which` of a source, with new classes and labels."""
    order = np.lexsort((which, labels))
    which, labels = which[order], labels[order]
    source.names = [source.names[i] for i in which.tolist()]
    source.sizes, source.labels, source.classes = source.sizes[which], labels, classes
    for name in ("offsets", "archive_of"):
        values = getattr(source, name)
        setattr(source, name, None if values is None else values[which])
    return source


def _part(source: Source, split: str, share: float, seed: int) -> Source:
    """Keep the train or the val part of each class; both parts follow from the same seed."""
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
    """Keep the images of the given classes, and number these in their order."""
    there = {source.classes[label].strip() for label in np.unique(source.labels).tolist()}
    known = there & {name.strip() for name in classes}
    if not known:
        # Labels that are numbers, as in lists, are places among the classes.
        number = number_by(classes, there)
    else:
        number = {name.strip(): i for i, name in enumerate(classes)}
    place = np.array([number.get(name.strip(), -1) for name in source.classes], np.int32)
    labels = place[source.labels]
    which = np.flatnonzero(labels >= 0)
    dropped = {source.classes[label] for label in source.labels[labels < 0].tolist()}
    if len(which) < len(source):
        source.warnings.append(
            f"{len(source) - len(which):,} of {len(source):,} images are left out: their classes "
            f"are not in the list of classes (such as {min(dropped)})"
        )
    missing = [name for i, name in enumerate(classes) if i not in set(labels[which].tolist())]
    if missing:
        source.warnings.append(
            f"{len(missing):,} of {len(classes):,} classes have no images, such as {missing[0]}"
        )
    return _take(source, which, list(classes), labels[which])
