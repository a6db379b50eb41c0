"""Choosing the images of a source that a list names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mae_scale.data.remote import printable
from mae_scale.errors import UserError
from mae_scale.sharding.labels import normal
from mae_scale.sharding.listing import Entry, Listing, Source, sorted_source
from mae_scale.sharding.lists import read_list
from mae_scale.sharding.splits import classes_anywhere, tree_of


def take_list(
    listing: Listing, root: Path, list_file: Path, class_depth: int | None = None
) -> Source:
    """Take the images that a list names, with the labels of the list, or else of the source.

    A name in the list matches an image if one of the two paths ends with the other. A path with
    another beginning matches, too, if at least its last folder agrees. Suffixes may be missing.

    Args:
        listing: images of the source.
        root: folder or archive to which their names are relative.
        list_file: file with the list, see `read_list`.
        class_depth: number of folders of a class's path, if the list has no labels.

    Raises:
        UserError: no image is found, some lines have labels and others none, or an image has two.
    """
    rows = [(_clean(path), label) for path, label in read_list(list_file)]
    place = _Places(listing, {path for path, _ in rows})
    entries: list[Entry] = []
    label_of: dict[str, str | None] = {}
    missing, twice = [], 0
    for path, label in rows:
        entry = place.find(path)
        if entry is None:
            missing.append(path)
            continue
        where = f"{entry.archive}:{entry.offset}:{entry.name}"
        if where in label_of:
            if label_of[where] != label:
                raise UserError(
                    f"{list_file} gives {printable(path)} two labels, {label_of[where]} and {label}"
                )
            twice += 1
            continue
        label_of[where] = label
        entries.append(entry if label is None else entry._replace(class_name=label))
    if not entries:
        raise UserError(
            f"{root} has none of the {len(rows):,} images of {list_file}: {printable(rows[0][0])}"
        )
    labelled = sum(label is not None for label in label_of.values())
    if 0 < labelled < len(entries):
        raise UserError(f"{list_file} has labels in {labelled:,} of {len(entries):,} lines only")
    warnings = []
    if missing:
        warnings.append(
            f"{len(missing):,} images of {list_file} are not in {root}, or their names are not "
            f"unique there, and are left out (such as {printable(missing[0])})"
        )
    if twice:
        warnings.append(f"{list_file} names {twice:,} images more than once; each is taken once")
    if not labelled and not entries[0].class_name:
        class_name = classes_anywhere(tree_of(listing), class_depth)
        stray = [e for e in entries if e.name.rpartition("/")[0] not in class_name]
        entries = [
            e._replace(class_name=class_name[e.name.rpartition("/")[0]])
            for e in entries
            if e.name.rpartition("/")[0] in class_name
        ]
        if stray:
            warnings.append(
                f"{len(stray):,} images of {list_file} lie beside folders of classes, in none of "
                f"them, and are left out (such as {printable(stray[0].name)})"
            )
    source = sorted_source("list", root, entries, numbered(entries) if labelled else None)
    source.warnings += warnings
    return source


def numbered(entries: Sequence[Entry]) -> list[str] | None:
    """Return the classes of labels that are numbers, counted from 0; None if labels are names."""
    names = {e.class_name for e in entries}
    if all(name.isdecimal() for name in names) and max(map(int, names)) < 1_000_000:
        return [str(i) for i in range(max(map(int, names)) + 1)]
    return None


def _clean(path: str) -> str:
    """Return the path of a list in the form of the paths below the source."""
    return normal(path.replace("\\", "/").removeprefix("./").strip("/"))


def _endings(path: str) -> Iterator[str]:
    """Yield a path and its endings, the longest first: a/b/c, b/c, c."""
    while True:
        yield path
        if "/" not in path:
            return
        path = path.partition("/")[2]


class _Places:
    """Images by the endings of their paths; only those that a list may mean are kept."""

    def __init__(self, listing: Listing, wanted: set[str]) -> None:
        keys = {ending for path in wanted for ending in _endings(path)}
        self._ending: dict[str, Entry | None] = {}  # None: several images end like this
        self._whole: dict[str, Entry | None] = {}
        for entry in listing.images:
            path = normal(entry.name)
            for form in {path, path.rpartition(".")[0]}:
                if form in keys:
                    self._whole[form] = None if form in self._whole else entry
                for ending in _endings(form):
                    if ending in keys:
                        self._ending[ending] = None if ending in self._ending else entry

    def find(self, path: str) -> Entry | None:
        """Return the image that a path means; None if there is no such image, or more than one."""
        if path in self._whole:
            return self._whole[path]
        if path in self._ending:
            return self._ending[path]
        *shorter, base = list(_endings(path))[1:] or [path]
        for ending in [*shorter, base]:
            if ending in self._whole:
                return self._whole[ending]
        for ending in shorter:  # at least one folder agrees
            if ending in self._ending:
                return self._ending[ending]
        return None
