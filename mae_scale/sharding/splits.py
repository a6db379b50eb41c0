"""Folders of images as a tree: which of them are splits, which are masks, and which are classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import VAL_NAME, stem_of
from mae_scale.sharding.listing import Choice, Listing
from mae_scale.sharding.words import (
    IMAGE_FOLDERS,
    looks_like_masks,
    own_word,
    split_word,
    splits_in,
)


@dataclass
class Folder:
    """A folder with images in it or below it."""

    path: str  # path below the source; empty for the source itself
    direct: int = 0  # number of images in the folder itself
    total: int = 0  # number of images in the folder and below it
    children: dict[str, Folder] = field(default_factory=dict)
    validation: bool = False  # whether it holds ImageNet's validation images, as in their tar

    @property
    def deep(self) -> bool:
        """Whether images lie in folders below the folder."""
        return bool(self.children)

    def walk(self) -> Iterator[Folder]:
        """Yield this folder and all folders below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def tree_of(listing: Listing) -> Folder:
    """Return the folders of a list of images as a tree."""
    counts = Counter(entry.name.rpartition("/")[0] for entry in listing.images)
    validation = {
        entry.name.rpartition("/")[0]
        for entry in listing.images
        if VAL_NAME.fullmatch(stem_of(entry.name))
    }
    root = Folder("")
    for path, count in sorted(counts.items()):
        folder = root
        folder.total += count
        for name in path.split("/") if path else ():
            inner = f"{folder.path}/{name}" if folder.path else name
            folder = folder.children.setdefault(name, Folder(inner))
            folder.total += count
        folder.direct = count
        folder.validation = path in validation
    return root


class Found(NamedTuple):
    """The folders that hold a split."""

    folders: list[Folder]
    has_splits: bool  # whether folders of the source tell which images are train and val
    warnings: list[str]
    others: dict[str, Folder]  # folders of the other splits, by name


def find_split(root: Folder, listing: Listing, split: str, src: Path, choice: Choice) -> Found:
    """Find the folders of a split: the source itself if its folders are classes.

    Args:
        choice: with a depth of the classes only clear splits count; with that or a share for val,
            the user has said what the other folders are.

    Raises:
        UserError: there are splits but not this one, or it is not clear whether there are.
    """
    if choice.class_depth is not None:
        clear = _clear_splits(root)
        if clear is None:
            return Found([root], False, [], {})
        root = clear
    warnings = []
    while True:
        chosen = _split_folders(root, split, src)
        if chosen is not None:
            break
        if (inner := _below_cover(root)) is None:
            break
        if root.direct:
            warnings.append(_left_out_text(root.direct, src / root.path, "beside its only folder"))
        root = inner
    if chosen is None and choice.sure:
        return Found([root], False, warnings, {})
    if chosen is None:
        _refuse_inner_splits(root, src)
        _refuse_masks(root, src)
        _refuse_shared_names(root, src)
        _refuse_lists(root, listing, src)
        return Found([root], False, warnings, {})
    rest = {n: f for n, f in root.children.items() if f not in chosen and not split_word(n)[1]}
    if rest:
        count = sum(folder.total for folder in rest.values())
        warnings.append(
            f"{count:,} images in {', '.join(sorted(rest)[:4])} are left out: these folders lie "
            f"beside the splits of {src / root.path}"
        )
    if root.direct:
        warnings.append(_left_out_text(root.direct, src / root.path, "beside the splits"))
    if len(chosen) > 1:
        parts = ", ".join(Path(folder.path).name for folder in chosen)
        warnings.append(f"{parts} in {src / root.path} are put together as {split}")
    others = {n: f for n, f in root.children.items() if f not in chosen and split_word(n)[1]}
    inside = []
    for folder in chosen:
        if not choice.sure:
            _refuse_inner_splits(folder, src)
            _refuse_masks(folder, src)
        inner = uncovered(folder)
        if inner is not folder and folder.direct:
            warnings.append(_left_out_text(folder.direct, src / folder.path, "beside a folder"))
        inside.append(inner)
    return Found(inside, True, warnings, others)


def _below_cover(root: Folder) -> Folder | None:
    """Return the only folder in a folder if it has subfolders and most of the images."""
    inner = next(iter(root.children.values())) if len(root.children) == 1 else None
    if inner is None or not inner.deep or inner.direct > inner.total - inner.direct:
        return None
    return inner


def _clear_splits(root: Folder) -> Folder | None:
    """Return the folder that holds two or more splits, and nothing else unless all have classes."""
    below: Folder | None = root
    while below is not None:
        words = {n: split_word(n)[0] for n in below.children if split_word(n)[1]}
        deep = [uncovered(below.children[name]).deep for name in words]
        alone = len(words) == len(below.children)
        if len(set(words.values())) > 1 and (all(deep) or (any(deep) and alone)):
            return below
        below = _below_cover(below)
    return None


def uncovered(folder: Folder) -> Folder:
    """Return the folder that holds the classes of a split: train itself, or train/images."""
    while len(folder.children) == 1 and next(iter(folder.children)).lower() in IMAGE_FOLDERS:
        folder = next(iter(folder.children.values()))
    return folder


def _left_out_text(count: int, folder: Path, where: str) -> str:
    return f"{count:,} images lie in {folder} itself, {where}, and are left out"


def _split_folders(root: Folder, split: str, src: Path) -> list[Folder] | None:
    """Return the folders of the split below a folder; None if its folders are no splits."""
    tops = root.children
    words = {name: split_word(name) for name in tops}
    exact = {name for name in tops if words[name][0] and words[name][1]}
    loose = {name for name in tops if words[name][0] and not words[name][1]}
    loose = {name for name in loose if not looks_like_masks(name)}
    if not exact:
        splits = {words[name][0] for name in loose}
        if len(splits) > 1 or (
            loose and len(loose) == len(tops) and any(tops[name].deep for name in loose)
        ):
            raise _unclear(src, loose)
        return None
    splits = {words[name][0] for name in exact}
    others = {name for name in set(tops) - exact if not looks_like_masks(name)}
    within = {name: uncovered(tops[name]) for name in exact}
    deep = {name for name in exact if within[name].deep or within[name].validation}
    if len(splits) > 1 or not set(tops) - exact:
        mine = {name for name in exact if words[name][0] == split}
        if deep and mine and not mine & deep:
            raise UserError(
                f"{src}: {', '.join(sorted(mine))} has no class folders, but "
                f"{', '.join(sorted(deep))} has; give its labels with --list"
            )
        if not deep and others - loose:
            raise _unclear(src, exact)
        if not deep and len(splits) == 1 and len(exact) > 1:
            raise _unclear(src, exact)
        if any(tops[name].deep for name in loose):
            raise _unclear(src, loose)
        return _of_split(root, exact, split, src)
    # A name of one split stands beside folders of other names.
    if not others:  # all other folders hold masks
        return _of_split(root, exact, split, src)
    if not deep:
        return None  # train is the name of a class
    if any(tops[name].deep for name in others) or any(len(within[n].children) > 1 for n in exact):
        raise _unclear(src, exact)
    return None


def _of_split(root: Folder, exact: set[str], split: str, src: Path) -> list[Folder]:
    mine = sorted(name for name in exact if split_word(name)[0] == split)
    words = {own_word(name) for name in mine}
    if "trainval" in words and len(words) > 1:
        mine = [name for name in mine if own_word(name) != "trainval"]
        words -= {"trainval"}
    if not mine:
        raise UserError(
            f"{src} has no {split} split; it has: {', '.join(sorted(exact))}; to use one of them "
            f"as {split}, give it as SRC"
        )
    if len(words) > 1:
        raise UserError(
            f"{src}: {' and '.join(mine)} may both mean {split}; give one of them as SRC"
        )
    folders = [root.children[name] for name in mine]
    # train.X1 and train.X2 are parts; train and train_64 are copies of another size.
    part = re.compile(r"(.*?\D)([._ -]?(part)?[a-z]?[0-2]?\d|[._ -][a-z])", re.I)
    parts = [part.fullmatch(name) for name in mine]
    if len(folders) > 1 and (not all(parts) or len({match[1] for match in parts if match}) > 1):
        raise UserError(
            f"{src}: it is not clear whether {' and '.join(mine)} are parts or copies of "
            f"{split}; give one of them as SRC"
        )
    return folders


def _unclear(src: Path, names: set[str]) -> UserError:
    return UserError(
        f"{src}: it is not clear whether {', '.join(sorted(names)[:4])} are splits or classes; "
        "give the folder of the split as SRC, or say that folders are classes with --class-depth"
    )


# Refusing folders that look like splits or masks, but whose meaning is not clear


def _refuse_inner_splits(root: Folder, src: Path) -> None:
    for folder in root.walk():
        names = [n for n in folder.children if split_word(n)[0] and split_word(n)[1]]
        if len({split_word(name)[0] for name in names}) > 1:
            raise UserError(
                f"{src}: {', '.join(sorted(names)[:4])} in {folder.path} look like splits, which "
                "must lie above the classes; give a list of each with --list, or say that they "
                "are classes with --class-depth"
            )


def _refuse_masks(root: Folder, src: Path) -> None:
    for folder in root.walk():
        masks = sorted(name for name in folder.children if looks_like_masks(name))
        if masks and (folder.direct or len(folder.children) > len(masks)):
            raise UserError(
                f"{src / folder.path} has images in {', '.join(masks[:4])}, which look like masks "
                "or annotations and not like a class; give the folder of the photographs as SRC, "
                "a list of them with --list, or say that all folders are classes with "
                "--class-depth"
            )
    plain = [n for n in root.children if n.lower() in IMAGE_FOLDERS]
    if plain and len(root.children) > 1 and not root.children[plain[0]].deep:
        raise UserError(
            f"{src / root.path} has images in {', '.join(sorted(root.children)[:4])}; if the "
            f"photographs are those in {plain[0]}, give that as SRC, or say that the folders are "
            "classes with --class-depth 1"
        )


def _refuse_shared_names(root: Folder, src: Path) -> None:
    """Refuse folders with the same classes: splits with unknown names, or domains."""
    tops = [folder for folder in root.children.values() if not folder.direct]
    names = Counter(name for folder in tops for name in folder.children)
    shared = [name for name, count in names.items() if count > 1]
    if len(shared) > 1 and 2 * len(shared) >= len(names):
        raise UserError(
            f"{src / root.path}: {', '.join(sorted(Path(f.path).name for f in tops)[:4])} hold "
            f"folders of the same names ({', '.join(sorted(shared)[:3])}), as splits do; give one "
            "of them as SRC, or say with --class-depth how many folders of a path are the class"
        )


def refuse_shared_classes(class_name: dict[str, str], where: Path) -> None:
    """Refuse classes of several folders with the same last names, as parts of a split have."""
    ends: dict[str, set[str]] = {}
    for name in set(class_name.values()):
        if "/" in name:
            ends.setdefault(name.rpartition("/")[2], set()).add(name)
    shared = sorted(end for end, names in ends.items() if len(names) > 1)
    if shared and 2 * len(shared) >= len(ends):
        two = " and ".join(sorted(ends[shared[0]])[:2])
        raise UserError(
            f"{where}: it is not clear what the classes are, since {len(shared):,} of them would "
            f"end in the same name as another ({two}); give one of the folders as SRC, or say with "
            "--class-depth how many folders of a path are the class"
        )


def _refuse_lists(root: Folder, listing: Listing, src: Path) -> None:
    """Refuse a source whose splits are listed in files such as train.txt and test.txt."""
    spoken: dict[str, set[str]] = {}
    for name in listing.tables:
        if splits := splits_in(stem_of(name)):
            spoken[name] = splits
    if len(set().union(*spoken.values())) > 1:
        text = all(name.lower().endswith((".mat", ".xlsx")) for name in spoken)
        how = "a text with a path and a label in each line" if text else "such a list"
        raise UserError(
            f"{src} has no folders of splits, but {', '.join(sorted(spoken)[:3])} look like lists "
            f"of splits; give {how} with --list, or take all images as one split with --class-depth"
        )


def refuse_paired(listing: Listing, src: Path) -> None:
    """Refuse folders in which images have masks beside them: ``1.jpg`` and ``1_mask.png``."""
    stems: dict[str, set[str]] = {}
    for entry in listing.images:
        stem, _, suffix = entry.name.rpartition(".")
        stems.setdefault(stem.lower(), set()).add(suffix.lower())
    pairs = []
    for stem, suffixes in stems.items():
        if len(suffixes) > 1 and "png" in suffixes:
            pairs.append(f"{stem}.png")
        bare = re.sub(r"[._-](mask|masks|seg|gt|label|labels|segmentation|annotation|depth)$",
                      "", stem)  # fmt: skip
        if bare != stem and bare in stems:
            pairs.append(stem)
    if pairs and 3 * len(pairs) >= len(listing.images):
        raise UserError(
            f"{src}: {len(pairs):,} images such as {pairs[0]} lie beside an image of the same "
            "name, as masks do; give a list of the photographs with --list, or say with "
            "--class-depth that all are images"
        )


# Classes


def classes_of(root: Folder, depth: int | None) -> dict[str, str]:
    """Return the class of each folder below a root, by path, without folders that have no class.

    As in torchvision's ImageFolder, the folder at the top is the class. Where most top folders hold
    no images themselves (Places: ``a/abbey``, iNaturalist: ``Aves/1234``), the class is the
    outermost folder with more images in itself than below it. A last part that all paths share
    (Tiny ImageNet: ``n01443537/images``) is dropped.
    """
    skip = len(root.path) + 1 if root.path else 0
    if not root.children:
        return {root.path: "images"}
    if depth is not None:
        names = {f.path: f.path[skip:].split("/") for f in root.walk() if f is not root}
        return {path: "/".join(n[:depth]) for path, n in names.items() if len(n) >= depth}
    tops = list(root.children.values())
    flat = sum(top.direct > top.total - top.direct for top in tops)
    deep = sum(top.direct < top.total - top.direct for top in tops)
    found: dict[str, str] = {}
    for top in tops:
        _name_classes(top, skip, found, at_once=flat >= deep)
    used = set(found.values())
    if all("/" in name for name in used) and len({n.rpartition("/")[2] for n in used}) == 1:
        found = {path: name.rpartition("/")[0] for path, name in found.items()}
    return found


def classes_anywhere(root: Folder, depth: int | None) -> dict[str, str]:
    """Return the class of each folder, over all splits of the source; see `classes_of`."""
    clear = _clear_splits(root)
    if depth is not None and clear is None:
        return classes_of(root, depth)
    root = clear or root
    while True:
        splits = [uncovered(f) for name, f in root.children.items() if split_word(name)[1]]
        if any(folder.deep for folder in splits):
            return {k: v for folder in splits for k, v in classes_of(folder, depth).items()}
        if (inner := _below_cover(root)) is None:
            return classes_of(root, depth)
        root = inner


def classes_with_folders(root: Folder) -> list[str]:
    """Return the folders below classes that, unlike others, have most of their images there."""
    tops = [f for f in root.children.values() if f.direct < f.total - f.direct]
    mixed = len(tops) < len(root.children)
    return sorted(f"{f.path}/{min(f.children)}" for f in tops) if mixed else []


def _name_classes(folder: Folder, skip: int, found: dict[str, str], at_once: bool) -> None:
    if at_once or not folder.children or folder.direct > folder.total - folder.direct:
        for inner in folder.walk():
            found[inner.path] = folder.path[skip:]
        return
    for child in folder.children.values():
        _name_classes(child, skip, found, at_once)
