"""Folders of images in their usual layouts: finding the split, and the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import (
    VAL_NAME,
    kaggle_classes,
    stem_of,
    val_labels,
)
from mae_scale.sharding.labels import normal
from mae_scale.sharding.listing import Entry, Listing, Source, list_images, sorted_source
from mae_scale.sharding.lists import read_list, read_text

KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_WORDS = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "tst": "test",
    "unlabeled": "other", "unlabelled": "other",
}  # fmt: skip
# Other words in the names of splits' folders: train.X1, ILSVRC2012_img_train, val_256.
_NEUTRAL = {
    "x", "img", "imgs", "image", "images", "set", "data", "dataset", "split", "part", "imagenet",
    "ilsvrc", "large", "small", "full", "standard", "jpg", "jpeg", "folder", "crop", "cropped",
    "resized", "mini", "tiny", "k", "in", "px", "t", "v",
}  # fmt: skip
_MASKS = {
    "annotations", "annotation", "masks", "mask", "trimaps", "trimap", "segmentation",
    "segmentations", "seg", "groundtruth", "gt", "labels", "label", "segmentationclass",
    "segmentationobject", "annotationsxml", "depth", "bboxes",
}  # fmt: skip
_IMAGE_FOLDERS = {"images", "image", "img", "imgs", "jpegimages", "jpg"}


def split_word(name: str) -> tuple[str | None, bool]:
    """Return the split that a folder's name means, and whether the name says nothing else."""
    tokens = re.findall(r"[a-z]+", name.lower())
    splits = {_WORDS[token] for token in tokens if token in _WORDS}
    if len(splits) != 1:
        return None, False
    rest = [token for token in tokens if token not in _WORDS]
    return splits.pop(), all(token in _NEUTRAL for token in rest)


def from_folder(
    src: Path, split: str, class_depth: int | None, list_file: str | Path | None
) -> tuple[Source, bool]:
    """List the images of a split in a folder, and say whether the folder itself has splits.

    Args:
        class_depth: how many folders of a path are the class; None: this is found by looking, and
            folders that look like splits or masks are not taken for classes.
        list_file: list of the images to take, with or without labels.

    Raises:
        UserError: the split is not there, or it is not clear what the folders are.
    """
    if list_file is not None:
        return _listed(src, Path(list_file), class_depth), True
    kaggle = next((src / tree for tree in KAGGLE_TREES if (src / tree).is_dir()), None)
    if kaggle is not None:
        roots = _split_roots(kaggle, list_images(kaggle), split, src)
        return _classes_of(src, roots or [kaggle], "Kaggle's ImageNet", split, None), True
    known = _known(src, split)
    if known is not None:
        return known, True
    listing = list_images(src)
    if class_depth is not None:
        return _classes_of(src, [src], "image folder", split, class_depth, listing), False
    roots = _split_roots(src, listing, split, src)
    if roots is not None:
        return _classes_of(src, roots, "image folder", split, None), True
    return _classes_of(src, [src], "image folder", split, None, listing), False


# Finding the split


def _tops(listing: Listing) -> dict[str, list[list[str]]]:
    """Return the top folders that hold images; for each image in them, the folders below."""
    tops: dict[str, list[list[str]]] = {}
    for entry in listing.images:
        first, *rest = entry.name.split("/")
        if rest:
            tops.setdefault(first, []).append(rest[:-1])
    return tops


def _split_roots(root: Path, listing: Listing, split: str, src: Path) -> list[Path] | None:
    """Return the folders of the split, or None where the folders are classes.

    Raises:
        UserError: there are splits but not this one, or it is not clear whether there are.
    """
    tops = _tops(listing)
    words = {name: split_word(name) for name in tops}
    # Folders that hold their images directly are classes, except for flat validation images.
    deep = {name: any(paths) for name, paths in tops.items()}
    flat_val = {
        name for name in tops
        if not deep[name] and any(
            VAL_NAME.match(stem_of(e.name)) for e in listing.images if e.name.startswith(f"{name}/")
        )
    }  # fmt: skip
    exact = {name for name in tops if words[name][0] and words[name][1]}
    loose = {name for name in tops if words[name][0] and not words[name][1]}
    splits = {words[name][0] for name in exact}
    if not exact and not loose:
        return None
    others = set(tops) - exact
    if exact and (len(splits) > 1 or not others):
        with_classes = {name for name in exact if deep[name] or name in flat_val}
        if len(splits) == 1 and len(exact) > 1 and not with_classes:
            return None  # these are classes with names such as train and training
        mine = {name for name in exact if words[name][0] == split}
        if with_classes and mine and not mine & with_classes:
            raise UserError(
                f"{src}: {', '.join(sorted(mine))} has no class folders, but "
                f"{', '.join(sorted(with_classes))} has; give its labels with --list"
            )
        if loose & {name for name in tops if deep[name]}:
            raise _unclear(src, loose)
        return _of_split(root, exact, words, split, src)
    if exact:  # one split's name beside folders of other names
        if all(not deep[name] for name in exact):
            return None  # train is the name of a class
        if any(deep[name] for name in others):
            raise _unclear(src, exact)
        return None
    if any(deep[name] for name in loose) and len(loose) == len(tops):
        raise _unclear(src, loose)
    return None


def _of_split(
    root: Path, exact: set[str], words: dict[str, tuple[str | None, bool]], split: str, src: Path
) -> list[Path]:
    mine = sorted(name for name in exact if words[name][0] == split)
    if not mine:
        raise UserError(
            f"{src} has no {split} split; it has: {', '.join(sorted(exact))}; to use one of them "
            f"as {split}, give it as SRC"
        )
    return [root / name for name in mine]


def _unclear(src: Path, names: set[str]) -> UserError:
    return UserError(
        f"{src}: it is not clear whether {', '.join(sorted(names)[:4])} are splits or classes; "
        "give the folder of the split as SRC, or say that folders are classes with --class-depth"
    )


def _refuse_masks(src: Path, listing: Listing) -> None:
    tops = _tops(listing)
    masks = sorted(n for n in tops if re.sub(r"[^a-z]", "", n.lower()) in _MASKS)
    if masks and len(tops) > len(masks):
        raise UserError(
            f"{src} has images in {', '.join(masks)}, which look like masks or annotations and not "
            "like a class; give the folder of the photographs as SRC, a list of them with --list, "
            "or say that all folders are classes with --class-depth"
        )
    folders = [n for n in tops if n.lower() in _IMAGE_FOLDERS]
    if folders and len(tops) > 1 and not any(tops[folders[0]]):
        raise UserError(
            f"{src} has images in {', '.join(sorted(tops)[:4])}; if the photographs are those in "
            f"{folders[0]}, give that as SRC, or say that the folders are classes with "
            "--class-depth 1"
        )


# Datasets whose splits or labels lie in files of their own


def _known(src: Path, split: str) -> Source | None:
    """List the images of Tiny ImageNet, Food-101 or Oxford-IIIT Pets; None for anything else."""
    for root in (src, src / "tiny-imagenet-200", src / "food-101"):
        if (table := root / "val" / "val_annotations.txt").is_file():
            if split == "train":
                return _classes_of(root, [root / "train"], "Tiny ImageNet", split, None)
            rows = [line.split("\t") for line in read_text(table).splitlines() if line.strip()]
            wnid = {row[0]: row[1] for row in rows if len(row) > 1}
            return _labelled(root / "val", "Tiny ImageNet", wnid, table)
        if (root / "meta" / "train.txt").is_file() and (root / "images").is_dir():
            name = {"train": "train.txt", "val": "test.txt"}[split]
            return _listed(root / "images", root / "meta" / name, 1)
        if (root / "annotations" / "trainval.txt").is_file() and (root / "images").is_dir():
            table = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
            rows = [line.split() for line in read_text(table).splitlines() if line[:1] != "#"]
            breed = {f"{row[0]}.jpg": row[0].rpartition("_")[0] for row in rows if row}
            return _labelled(root / "images", "Oxford-IIIT Pets", breed, table)
    return None


def _labelled(folder: Path, kind: str, class_of: dict[str, str], table: Path) -> Source:
    """List the images of a folder that a table names."""
    listing = list_images(folder)
    entries = [
        entry._replace(class_name=class_of[entry.name.rpartition("/")[2]])
        for entry in listing.images
        if entry.name.rpartition("/")[2] in class_of
    ]
    missing = len(class_of) - len(entries)
    source = sorted_source(kind, folder, entries)
    if missing:
        source.warnings.append(f"{missing:,} images that {table} names are not in {folder}")
    return source


def _listed(src: Path, list_file: Path, class_depth: int | None) -> Source:
    """List the images that a list names, with its labels or else those of the folders."""
    listing = list_images(src)
    rows = read_list(list_file)
    places: dict[str, int | None] = {}
    for i, entry in enumerate(listing.images):
        base = entry.name.rpartition("/")[2]
        for key in {entry.name, entry.name.rpartition(".")[0]}:
            places[f"/{key}"] = i if f"/{key}" not in places else None
        for key in {base, base.rpartition(".")[0]}:
            places[key] = i if key not in places else None
    entries, missing, labelled = [], [], 0
    for path, label in rows:
        clean = normal_path(path)
        found = [places[k] for k in _lookup_keys(clean, src) if k in places]
        if not found or found[0] is None:
            missing.append(path)
            continue
        entry = listing.images[found[0]]
        labelled += label is not None
        entries.append(entry._replace(class_name=label or ""))
    if not entries:
        raise UserError(f"{src} has none of the {len(rows):,} images of {list_file}: {rows[0][0]}")
    if 0 < labelled < len(entries):
        raise UserError(f"{list_file} has labels in {labelled:,} of {len(entries):,} lines only")
    warnings = []
    if missing:
        warnings.append(
            f"{len(missing):,} images of {list_file} are not in {src}, or their names are not "
            f"unique there, and are left out (such as {missing[0]})"
        )
    if not labelled:
        names, stray = class_names(entries, class_depth)
        entries = [e._replace(class_name=n) for e, n in zip(entries, names, strict=True) if n]
        warnings += _stray_warning(stray, src)
    if len({e.name for e in entries}) < len(entries):
        warnings.append(f"{list_file} names some images more than once")
    source = sorted_source("list", src, entries, numbered(entries) if labelled else None)
    source.warnings += warnings
    return source


def numbered(entries: Sequence[Entry]) -> list[str] | None:
    """Return the classes of labels that are numbers, counted from 0; None where they are names."""
    names = {e.class_name for e in entries}
    if all(name.isdigit() for name in names) and max(map(int, names)) < 1_000_000:
        return [str(i) for i in range(max(map(int, names)) + 1)]
    return None


def normal_path(path: str) -> str:
    """Return a path of a list in the form that it has below the source."""
    return path.replace("\\", "/").removeprefix("./").strip("/")


def _lookup_keys(path: str, src: Path) -> list[str]:
    """Return the keys under which an image of a list may be found, the most exact first."""
    parts = path.split("/")
    whole = [f"/{'/'.join(parts[i:])}" for i in range(len(parts))]
    return [*whole, parts[-1]]


# Finding the classes


def _classes_of(
    src: Path,
    roots: Sequence[Path],
    kind: str,
    split: str,
    class_depth: int | None,
    listing: Listing | None = None,
) -> Source:
    entries: list[Entry] = []
    warnings: list[str] = []
    base = roots[0] if len(roots) == 1 else roots[0].parent
    for root in roots:
        found = listing or list_images(root)
        prefix = "" if root == base else f"{root.name}/"
        flat = [
            e for e in found.images if "/" not in e.name and VAL_NAME.fullmatch(stem_of(e.name))
        ]
        if flat and (len(flat) == len(found.images) or split == "val"):
            wnid_of, wnids = val_labels(src)  # validation images as they come out of the tar
            entries = [e._replace(class_name=wnid_of(e.name)) for e in flat]
            return sorted_source(kind, root, entries, wnids)
        if class_depth is None:
            _refuse_masks(root, found)
        outside = [e for e in found.images if "/" not in e.name]
        inside = [e for e in found.images if "/" in e.name]
        if outside and inside:
            warnings.append(
                f"{len(outside):,} images lie in {root} itself, outside the class folders, "
                f"and are left out (such as {outside[0].name})"
            )
        elif outside:
            warnings.append(f"{root} has no class folders: all images get the class 'images'")
        names, stray = class_names(inside or outside, class_depth)
        warnings += _stray_warning(stray, root)
        warnings += found.warnings(root)
        if found.empty and inside:
            warnings.append(
                f"{len(found.empty):,} folders of {root} hold no images and are no classes: "
                f"{', '.join(sorted(found.empty)[:4])}"
            )
        entries += [
            e._replace(class_name=normal(c), name=prefix + e.name)
            for e, c in zip(inside or outside, names, strict=True)
            if c
        ]
    classes = kaggle_classes(src) if kind.startswith("Kaggle") else None
    unknown = {e.class_name for e in entries} - set(classes) if classes else set()
    if unknown:
        raise UserError(f"{base} has classes that LOC_synset_mapping.txt lacks: {min(unknown)}")
    source = sorted_source(kind, base, entries, classes)
    source.warnings += warnings
    return source


def _stray_warning(stray: Sequence[str], root: Path) -> list[str]:
    if not stray:
        return []
    return [
        f"{len(stray):,} images in {root} lie beside folders of classes, in none of them, and are "
        f"left out (such as {stray[0]})"
    ]


def class_names(entries: Sequence[Entry], depth: int | None = None) -> tuple[list[str], list[str]]:
    """Return each image's class, from its path, empty for none; and the images without a class.

    As in torchvision's ImageFolder, the folder at the top is the class. Where most top folders hold
    no images themselves (Places: ``a/abbey``, iNaturalist: ``Aves/1234``), the class is the folder
    that holds the image; a last part that all share (Tiny ImageNet: ``n01443537/images``) is
    dropped.
    """
    if all("/" not in e.name for e in entries):
        return ["images"] * len(entries), []
    parts = [e.name.split("/")[:-1] for e in entries]
    if depth is not None:
        names = ["/".join(p[:depth]) if len(p) >= depth else "" for p in parts]
        return names, [e.name for e, n in zip(entries, names, strict=True) if not n]
    direct = {p[0] for p in parts if len(p) == 1}
    below = {p[0] for p in parts if len(p) > 1}
    if len(direct - below) >= len(below - direct):
        names = [p[0] if p else "" for p in parts]
    else:
        inner = {"/".join(p[:i]) for p in parts for i in range(1, len(p))}  # folders above others
        names = ["" if not p or "/".join(p) in inner else "/".join(p) for p in parts]
        used = [name for name in names if name]
        if len({name.rpartition("/")[2] for name in used}) == 1 and all("/" in n for n in used):
            names = [name.rpartition("/")[0] for name in names]
    return names, [e.name for e, n in zip(entries, names, strict=True) if not n]
