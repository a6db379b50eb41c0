"""Lists of images: `Source`, which holds one, and the search for images below a folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_scale.data.formats import is_array_name, is_image_name
from mae_scale.files import open_descriptor
from mae_scale.sharding.labels import normal
from mae_scale.sharding.words import LIST_SUFFIXES, SYSTEM_FOLDERS, may_list

# Suffixes of files that often lie beside images and are no images.
_OTHERS = {
    "txt", "csv", "tsv", "json", "xml", "md", "mat", "html", "db", "ini", "yaml", "yml", "log",
    "pdf", "py", "sh", "npy", "pkl", "parquet", "tar", "gz", "tgz", "zip", "dvc",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Choice of the images of a source, and of their classes."""

    list_file: str | Path | None = None  # file that names the images, see `read_list`
    classes: Sequence[str] | None = None  # only these, numbered in this order
    class_depth: int | None = None  # number of folders of a class's path; None: looked for
    val_share: float | None = None  # share of each class for val, if the source has no splits
    seed: int = 0  # seed of that split

    @property
    def sure(self) -> bool:
        """Whether the user has said that folders are classes, or how to split the images."""
        return self.val_share is not None or self.class_depth is not None


class Entry(NamedTuple):
    """One image in a list, before classes have numbers."""

    class_name: str
    name: str  # path in the folder or archive
    size: int  # bytes
    offset: int = -1  # offset in the archive; -1: the image is a file
    archive: int = 0  # number of the archive


@dataclass
class Source:
    """The images of one split, sorted by class and file name."""

    kind: str
    root: Path  # a folder, or the archive itself
    classes: list[str]  # sorted unless given; a label is a place in this list
    labels: npt.NDArray[np.int32]  # [n]
    names: list[str]  # [n], path below the root
    sizes: npt.NDArray[np.int64]  # [n], bytes
    offsets: npt.NDArray[np.int64] | None  # [n] into the archive; None: each image is a file
    warnings: list[str] = field(default_factory=list)
    taken: str = ""  # message about what was taken, if the source does not tell it
    archives: list[Path] = field(default_factory=list)  # archives, if there are several
    archive_of: npt.NDArray[np.int32] | None = None  # [n], number of the archive of each image
    _open: dict[int, int] = field(default_factory=dict)  # archive -> descriptor

    def __len__(self) -> int:
        return len(self.names)

    def file_name(self, i: int) -> str:
        """Return the name of an image's file, without folders."""
        return self.names[i].rpartition("/")[2]

    def title(self, i: int) -> str:
        """Return the name of an image for messages; it is the same in every form of the source."""
        return f"{self.classes[self.labels[i]]}/{self.file_name(i)}"

    def read(self, i: int) -> bytes:
        """Read the bytes of one image.

        Raises:
            OSError: the image cannot be read, or has changed since it was listed.
        """
        size = int(self.sizes[i])
        if self.offsets is None:
            # It was a file when it was listed. Asking again would take as long as opening it.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(f"{self.root}/{self.names[i]}", flags)
            try:
                data = os.read(descriptor, size + 1)
            finally:
                os.close(descriptor)
        else:
            data = os.pread(self._archive(i), size, int(self.offsets[i]))
        if len(data) != size:
            raise OSError(f"{self.root / self.names[i]} changed while it was being sharded")
        return data

    def _archive(self, i: int) -> int:
        number = 0 if self.archive_of is None else int(self.archive_of[i])
        if number not in self._open:
            if len(self._open) > 500:  # the usual limit of a process is 1024 files
                os.close(self._open.pop(next(iter(self._open))))
            path = self.archives[number] if self.archives else self.root
            self._open[number] = open_descriptor(path)
        return self._open[number]

    def fingerprint(self) -> str:
        """Return the SHA-256 of class, file name and size of every image."""
        lines = [*self.classes]
        lines += [f"{self.title(i)} {size}" for i, size in enumerate(self.sizes.tolist())]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def sorted_source(
    kind: str, root: Path, entries: list[Entry], classes: list[str] | None = None
) -> Source:
    """Make a source of these images; classes are sorted unless they are given."""
    entries = [entry._replace(class_name=normal(entry.class_name)) for entry in entries]
    if classes is None:
        classes = sorted({entry.class_name for entry in entries})
    classes = [normal(name) for name in classes]
    label = {name: i for i, name in enumerate(classes)}
    entries.sort(key=lambda e: (label[e.class_name], e.name.rpartition("/")[2], e.name))
    in_archive = bool(entries) and entries[0].offset >= 0
    return Source(
        kind=kind,
        root=root,
        classes=classes,
        labels=np.array([label[e.class_name] for e in entries], np.int32),
        names=[e.name for e in entries],
        sizes=np.array([e.size for e in entries], np.int64),
        offsets=np.array([e.offset for e in entries], np.int64) if in_archive else None,
        archive_of=np.array([e.archive for e in entries], np.int32) if in_archive else None,
    )


@dataclass
class Listing:
    """Images and other files below a folder."""

    images: list[Entry] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    empty: list[str] = field(default_factory=list)  # top folders without an image
    tables: list[str] = field(default_factory=list)  # files that may be lists of images
    notes: list[str] = field(default_factory=list)  # other warnings

    def warnings(self, root: Path) -> list[str]:
        """Return warnings of what was left out, with an example for each reason."""
        kinds = Counter(reason for _, reason in self.left_out)
        lines = []
        for reason, count in kinds.items():
            example = min(name for name, r in self.left_out if r == reason)
            lines.append(f"{count:,} files in {root} are left out: {reason} (such as {example})")
        return lines

    def leave_out_arrays(self) -> None:
        """Leave out arrays that lie beside images of other formats: they are masks or features."""
        images = [entry for entry in self.images if not is_array_name(entry.name)]
        if images and len(images) < len(self.images):
            arrays = (entry.name for entry in self.images if is_array_name(entry.name))
            self.left_out += [(name, "an array, beside images of other forms") for name in arrays]
            self.images = images


def list_images(root: Path) -> Listing:
    """List all images below `root`, in many threads, because network file systems answer slowly."""
    listing = Listing()
    with os.scandir(root) as top:
        tops = sorted((i for i in top if not i.name.startswith(".")), key=lambda i: i.name)
    tops = [item for item in tops if item.name.lower() not in SYSTEM_FOLDERS]
    here = os.path.realpath(root)
    folders = []
    for item in tops:
        if not _is_folder(item):
            _take(item, item.name, listing)
        elif item.is_symlink() and f"{here}/".startswith(f"{os.path.realpath(item.path)}/"):
            listing.left_out.append((item.name, "a link to a folder that it lies in"))
        else:
            folders.append(item.name)
    todo: SimpleQueue[str] = SimpleQueue()
    answers: SimpleQueue[tuple[str, Listing | OSError]] = SimpleQueue()
    for name in folders:
        todo.put(name)

    def work() -> None:
        with suppress(Empty):
            while True:
                name = todo.get_nowait()
                try:
                    found = Listing()
                    _walk(root / name, name, found, frozenset())
                    answers.put((name, found))
                except OSError as error:
                    answers.put((name, error))

    # The threads are daemons behind plain queues, so that Ctrl-C ends the program at any moment,
    # which a pool may prevent.
    for _ in range(min(16, len(folders))):
        Thread(target=work, daemon=True).start()
    for _ in folders:
        name, answer = answers.get()
        if isinstance(answer, OSError):
            raise answer
        listing.images += answer.images
        listing.left_out += answer.left_out
        listing.tables += answer.tables
        listing.empty += answer.empty
    listing.leave_out_arrays()
    return listing


def _walk(folder: Path, prefix: str, found: Listing, links: frozenset[str]) -> None:
    images, empty = len(found.images), len(found.empty)
    with os.scandir(folder) as items:
        for item in items:
            name = f"{prefix}/{item.name}"
            if item.name.startswith("."):
                continue
            if _is_folder(item):
                if item.name.lower() in SYSTEM_FOLDERS:
                    found.left_out.append((name, "a folder of the system"))
                    continue
                inside = links
                if item.is_symlink():
                    target = os.path.realpath(item.path)
                    here = os.path.realpath(folder)
                    if target in links or f"{here}/".startswith(f"{target.rstrip('/')}/"):
                        found.left_out.append((name, "a link to a folder that it lies in"))
                        continue
                    inside = links | {target}
                _walk(folder / item.name, name, found, inside)
            else:
                _take(item, name, found)
    if len(found.images) == images:
        found.empty[empty:] = [prefix]


def _is_folder(item: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself
        return item.is_dir()
    return False


def _is_file(item: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return item.is_file()
    return False


def _take(item: os.DirEntry[str], name: str, found: Listing) -> None:
    suffix = item.name.rpartition(".")[2].lower()
    if is_image_name(item.name):
        if _is_file(item):
            found.images.append(Entry("", name, item.stat().st_size))
        else:
            broken = item.is_symlink()
            found.left_out.append((name, "a broken link" if broken else "not a file"))
    elif suffix in LIST_SUFFIXES and name.count("/") <= 4 and may_list(item.name):
        found.tables.append(name)
    elif "." not in item.name or suffix not in _OTHERS:
        found.left_out.append((name, f"not known as an image (.{suffix})" if "." in item.name
                               else "without a suffix"))  # fmt: skip
