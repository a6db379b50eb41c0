"""Finding splits and classes of images in the usual layouts of folders and archives."""

from __future__ import annotations

from pathlib import Path

from mae_scale.errors import UserError
from mae_scale.sharding.imagenet import VAL_NAME, base_of, kaggle_classes, stem_of, val_labels
from mae_scale.sharding.known import covers, find_known
from mae_scale.sharding.labels import normal
from mae_scale.sharding.listing import Choice, Entry, Listing, Source, list_images, sorted_source
from mae_scale.sharding.matching import take_list
from mae_scale.sharding.splits import (
    Found,
    classes_of,
    classes_with_folders,
    find_split,
    refuse_paired,
    refuse_shared_classes,
    tree_of,
    uncovered,
)

KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


def from_folder(src: Path, split: str, choice: Choice) -> tuple[Source, bool]:
    """List the images of a split in a folder, and return whether the folder itself has splits.

    Raises:
        UserError: the split is missing, or the meaning of the folders is not clear.
    """
    if choice.list_file is not None:
        return from_listing(list_images(src), src, "image folder", split, choice)
    for folder in covers(src):
        for tree in KAGGLE_TREES:
            if (folder / tree).is_dir():
                listing = list_images(folder / tree)
                return from_listing(listing, folder / tree, "Kaggle's ImageNet", split, choice)
    known = find_known(src, split) if choice.class_depth is None else None
    if known is not None:
        return known, True
    return from_listing(list_images(src), src, "image folder", split, choice)


def from_listing(
    listing: Listing, root: Path, kind: str, split: str, choice: Choice
) -> tuple[Source, bool]:
    """Choose the images of a split from a list; see `from_folder`.

    Args:
        listing: all images below `root`.
        root: folder or archive to which the names in the list are relative.
        kind: kind of source, for messages.
        split: split to choose, "train" or "val".
    """
    if choice.list_file is not None:
        return take_list(listing, root, Path(choice.list_file), choice.class_depth), True
    found = find_split(tree_of(listing), listing, split, root, choice)
    source = _classes_in(listing, found, root, kind, split, choice)
    if not choice.sure:
        inside = tuple(f"{f.path}/" if f.path else "" for f in found.folders)
        refuse_paired(Listing([e for e in listing.images if e.name.startswith(inside)]), root)
    source.warnings += found.warnings
    if choice.class_depth is None and choice.classes is None and "Kaggle" not in kind:
        source.warnings += _compare_splits(source, found, root, split)
    return source, found.has_splits


def _compare_splits(source: Source, found: Found, root: Path, split: str) -> list[str]:
    """Compare the classes of a split with those of the other splits, and return warnings.

    Raises:
        UserError: the classes lie at other depths, so the folders mean something else.
    """
    mine = set(source.classes)
    lines = []
    for name, folder in found.others.items():
        inner = uncovered(folder)
        if not inner.deep or inner.validation or mine == {"images"}:
            continue
        theirs = set(map(normal, classes_of(inner, None).values()))
        few = min(len(mine), len(theirs)) < 2
        if not few and not {c.count("/") for c in mine} & {c.count("/") for c in theirs}:
            raise UserError(
                f"{root}: the classes of {split} lie at another depth than those of {name} "
                f"({min(mine)} and {min(theirs)}); say with --class-depth how many folders of a "
                "path are the class"
            )
        if mine != theirs and mine & theirs:
            one = min(mine ^ theirs)
            lines.append(
                f"{split} has {len(mine):,} classes and {name} {len(theirs):,} (only one of them "
                f"has {one}): each numbers its own; --classes with the shards of the other gives "
                "both the same numbers"
            )
    return lines


def _classes_in(
    listing: Listing, found: Found, root: Path, kind: str, split: str, choice: Choice
) -> Source:
    entries: list[Entry] = []
    warnings: list[str] = []
    for folder in found.folders:
        prefix = f"{folder.path}/" if folder.path else ""
        where = root / folder.path
        inside = [e for e in listing.images if e.name.startswith(prefix)]
        if folder.validation and (split == "val" or not folder.children):
            wnid_of, wnids = val_labels(where)  # validation images as unpacked from the tar
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
            tables = [n for n in listing.tables if n.startswith(prefix) or "/" not in n]
            hint = f"; if {tables[0]} has labels, give it with --list" if tables else ""
            warnings.append(
                f"{where} has no class folders: all images get the class 'images'{hint}"
            )
        class_name = classes_of(folder, choice.class_depth)
        if not choice.sure:
            refuse_shared_classes(class_name, where)
            if not any("/" in name for name in class_name.values()):
                warnings += _say_tops(classes_with_folders(folder), where)
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
        warnings += _left_out(listing, prefix, where, class_name if folder.children else None)
    classes = kaggle_classes(root) if kind.startswith("Kaggle") else None
    unknown = {e.class_name for e in entries} - set(classes) if classes else set()
    if unknown:
        raise UserError(f"{root} has classes that LOC_synset_mapping.txt lacks: {min(unknown)}")
    if choice.class_depth is not None and listing.images and not entries:
        raise UserError(f"{root}: no image lies {choice.class_depth} folders deep")
    source = sorted_source(kind, root, entries, classes)
    source.warnings += warnings
    return source


def _say_tops(folders: list[str], where: Path) -> list[str]:
    return [
        f"{len(folders):,} classes of {where} have most of their images in folders below them "
        f"(such as {folders[0]}), which count as the class at the top; say another --class-depth "
        "if these are classes"
    ] if folders else []  # fmt: skip


def _left_out(
    listing: Listing, prefix: str, where: Path, class_name: dict[str, str] | None
) -> list[str]:
    """Return warnings of what was left out below a folder, and of folders without images.

    Args:
        class_name: class of each folder, by path; None if there are no class folders.
    """
    below = Listing(left_out=[(n, r) for n, r in listing.left_out if n.startswith(prefix)])
    lines = below.warnings(where)
    empty = [
        name[len(prefix) :]
        for name in sorted(listing.empty)
        if name.startswith(prefix) and name.rpartition("/")[0] not in (class_name or ())
    ]
    if empty and class_name is not None:
        lines.append(
            f"{len(empty):,} folders of {where} hold no images and are no classes: "
            f"{', '.join(empty[:4])}"
        )
    return lines
