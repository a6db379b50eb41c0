"""Images in their usual layouts, in folders or in archives: finding the split, and the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import VAL_NAME, base_of, kaggle_classes, stem_of, val_labels
from mae_scale.sharding.labels import normal
from mae_scale.sharding.listing import Entry, Listing, Source, list_images, sorted_source
from mae_scale.sharding.lists import read_text
from mae_scale.sharding.matching import take_list
from mae_scale.sharding.splits import Folder, classes_of, find_split, refuse_paired, tree_of

KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


def from_folder(
    src: Path, split: str, class_depth: int | None, list_file: str | Path | None, sure: bool
) -> tuple[Source, bool]:
    """List the images of a split in a folder, and say whether the folder itself has splits.

    Args:
        class_depth: how many folders of a path are the class; None: this is found by looking, and
            folders that look like splits or masks are not taken for classes.
        list_file: list of the images to take, with or without labels.
        sure: the user has said how to split the images, so there are no splits to look for.

    Raises:
        UserError: the split is not there, or it is not clear what the folders are.
    """
    kaggle = next((src / tree for tree in KAGGLE_TREES if (src / tree).is_dir()), None)
    if list_file is None and kaggle is None:
        known = _known(src, split)
        if known is not None:
            return known, True
    root = src if kaggle is None or list_file is not None else kaggle
    kind = "image folder" if kaggle is None else "Kaggle's ImageNet"
    listing = list_images(root)
    return from_listing(listing, root, src, kind, split, class_depth, list_file, sure)


def from_listing(
    listing: Listing,
    root: Path,
    src: Path,
    kind: str,
    split: str,
    class_depth: int | None,
    list_file: str | Path | None,
    sure: bool,
) -> tuple[Source, bool]:
    """Choose the images of a split from a list; see `from_folder`.

    Args:
        root: folder or archive that the names in the list begin at.
        src: the source as the user has given it, where files with labels may lie.
    """
    if list_file is not None:
        return take_list(listing, root, Path(list_file), class_depth), True
    tree = tree_of(listing)
    sure = sure or class_depth is not None
    found = find_split(tree, listing, split, src, sure)
    source = _classes_in(listing, found.folders, root, src, kind, split, class_depth)
    if not sure:
        inside = tuple(f"{f.path}/" if f.path else "" for f in found.folders)
        refuse_paired(Listing([e for e in listing.images if e.name.startswith(inside)]), src)
    source.warnings += found.warnings
    return source, found.has_splits


def _classes_in(
    listing: Listing,
    folders: Sequence[Folder],
    root: Path,
    src: Path,
    kind: str,
    split: str,
    class_depth: int | None,
) -> Source:
    entries: list[Entry] = []
    warnings: list[str] = []
    for folder in folders:
        prefix = f"{folder.path}/" if folder.path else ""
        where = root / folder.path
        inside = [e for e in listing.images if e.name.startswith(prefix)]
        if folder.validation and (split == "val" or not folder.children):
            wnid_of, wnids = val_labels(src)  # validation images as they come out of the tar
            flat = [e for e in inside if "/" not in e.name[len(prefix) :]]
            flat = [e for e in flat if VAL_NAME.fullmatch(stem_of(e.name))]
            if len(flat) < len(inside):
                warnings.append(
                    f"{len(inside) - len(flat):,} images in {where} are not named as ImageNet's "
                    "validation images, and are left out"
                )
            source = sorted_source(
                kind, root, [e._replace(class_name=wnid_of(e.name)) for e in flat], wnids
            )
            source.warnings += warnings
            return source
        if not folder.children:
            warnings.append(f"{where} has no class folders: all images get the class 'images'")
        class_name = classes_of(folder, class_depth)
        named = [
            e._replace(class_name=normal(class_name[e.name.rpartition("/")[0]]))
            for e in inside
            if e.name.rpartition("/")[0] in class_name
        ]
        outside = [e for e in inside if "/" not in e.name[len(prefix) :]] if folder.children else []
        if outside:
            warnings.append(
                f"{len(outside):,} images lie in {where} itself, outside the class folders, "
                f"and are left out (such as {base_of(outside[0].name)})"
            )
        if len(named) + len(outside) < len(inside):
            without = [e for e in inside if e.name.rpartition("/")[0] not in class_name]
            stray = min(e.name for e in without if "/" in e.name[len(prefix) :])
            warnings.append(
                f"{len(without) - len(outside):,} images in {where} lie beside folders of classes, "
                f"in none of them, and are left out (such as {stray[len(prefix) :]})"
            )
        entries += named
        warnings += _left_out(listing, prefix, where, bool(folder.children))
    classes = kaggle_classes(src) if kind.startswith("Kaggle") else None
    unknown = {e.class_name for e in entries} - set(classes) if classes else set()
    if unknown:
        raise UserError(f"{root} has classes that LOC_synset_mapping.txt lacks: {min(unknown)}")
    source = sorted_source(kind, root, entries, classes)
    source.warnings += warnings
    return source


def _left_out(listing: Listing, prefix: str, where: Path, has_classes: bool) -> list[str]:
    """Say what was left out below a folder, and which folders at its top hold no images."""
    below = Listing(left_out=[(n, r) for n, r in listing.left_out if n.startswith(prefix)])
    lines = below.warnings(where)
    empty = [name[len(prefix) :] for name in listing.empty if name.startswith(prefix)]
    empty = sorted(name for name in empty if name and "/" not in name)
    if empty and has_classes:
        lines.append(
            f"{len(empty):,} folders of {where} hold no images and are no classes: "
            f"{', '.join(empty[:4])}"
        )
    return lines


# Datasets whose splits or labels lie in files of their own


def _known(src: Path, split: str) -> Source | None:
    """List the images of Tiny ImageNet, Food-101 or Oxford-IIIT Pets; None for anything else."""
    for root in (src, src / "tiny-imagenet-200", src / "food-101", src / "oxford-iiit-pet"):
        if (table := root / "val" / "val_annotations.txt").is_file():
            if split == "train":
                listing = list_images(root / "train")
                folders = [tree_of(listing)]
                return _classes_in(
                    listing, folders, root / "train", src, "Tiny ImageNet", split, None
                )
            rows = [line.split("\t") for line in read_text(table).splitlines() if line.strip()]
            wnid = {row[0]: row[1] for row in rows if len(row) > 1}
            return _labelled(root / "val", "Tiny ImageNet", wnid, table)
        if (root / "meta" / "train.txt").is_file() and (root / "images").is_dir():
            name = {"train": "train.txt", "val": "test.txt"}[split]
            return take_list(list_images(root / "images"), root / "images", root / "meta" / name, 1)
        if (root / "annotations" / "trainval.txt").is_file() and (root / "images").is_dir():
            table = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
            rows = [line.split() for line in read_text(table).splitlines() if line[:1] != "#"]
            breed = {f"{row[0]}.jpg": row[0].rpartition("_")[0] for row in rows if row}
            return _labelled(root / "images", "Oxford-IIIT Pets", breed, table)
    return None


def _labelled(folder: Path, kind: str, class_of: dict[str, str], table: Path) -> Source:
    """List the images of a folder that a table names."""
    entries = [
        entry._replace(class_name=class_of[base_of(entry.name)])
        for entry in list_images(folder).images
        if base_of(entry.name) in class_of
    ]
    source = sorted_source(kind, folder, entries)
    if missing := len(class_of) - len(entries):
        source.warnings.append(f"{missing:,} images that {table} names are not in {folder}")
    return source
