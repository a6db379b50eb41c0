"""Where images come from: what people have of ImageNet, or any folder of class folders.

`find_source` looks at a folder and lists the images of one split, without unpacking or copying:

- the official archives, ``ILSVRC2012_img_train.tar`` (tars inside a tar) or
  ``ILSVRC2012_img_val.tar`` with the devkit: headers are read by seeking, images by offset;
- the Kaggle layout, ``ILSVRC/Data/CLS-LOC/{train,val}``;
- folders of class folders, with or without ``train`` and ``val`` above them.

The same images in another form give the same list, so they give the same shards.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_scale.errors import UserError
from mae_scale.sharding.processes import run_all

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation")}
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1000
DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE_TREES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


class Entry(NamedTuple):
    """One image as it is listed, before classes have numbers."""

    class_name: str
    name: str  # path in the folder or archive
    size: int
    offset: int = -1  # in the archive


@dataclass
class Source:
    """The images of one split, sorted by class and file name."""

    kind: str
    root: Path  # a folder, or the archive itself
    classes: list[str]  # sorted; a label is a place in this list
    labels: npt.NDArray[np.int32]  # [n]
    names: list[str]  # [n], path below the root
    sizes: npt.NDArray[np.int64]  # [n], bytes
    offsets: npt.NDArray[np.int64] | None  # [n] into the archive; None: each image is a file
    warnings: list[str] = field(default_factory=list)
    _archive: int = -1

    def __len__(self) -> int:
        return len(self.names)

    def file_name(self, i: int) -> str:
        return self.names[i].rpartition("/")[2]

    def title(self, i: int) -> str:
        """How to name an image to a person; the same for every form of the source."""
        return f"{self.classes[self.labels[i]]}/{self.file_name(i)}"

    def read(self, i: int) -> bytes:
        """The bytes of one image.

        Raises:
            OSError: it cannot be read, or it is not what was listed.
        """
        size = int(self.sizes[i])
        if self.offsets is None:
            descriptor = os.open(f"{self.root}/{self.names[i]}", os.O_RDONLY)
            try:
                data = os.read(descriptor, size + 1)
            finally:
                os.close(descriptor)
        else:
            if self._archive < 0:
                self._archive = os.open(self.root, os.O_RDONLY)
            data = os.pread(self._archive, size, int(self.offsets[i]))
        if len(data) != size:
            raise OSError(f"{self.root / self.names[i]} changed while it was being sharded")
        return data

    def fingerprint(self) -> str:
        """SHA-256 over class, file name and size of every image."""
        lines = [*self.classes]
        lines += [f"{self.title(i)} {size}" for i, size in enumerate(self.sizes.tolist())]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def find_source(src: str | Path, split: str, workers: int = 1) -> Source:
    """List the images of `split` ("train" or "val") in `src`.

    Raises:
        UserError: `src` does not exist, lacks the split, or holds no images.
    """
    src = Path(src)
    if not src.exists():
        raise UserError(f"{src} does not exist")
    if not src.is_dir():
        raise UserError(
            f"{src} is not a folder; give the folder that holds the archives or the class folders"
        )
    archive = src / f"ILSVRC2012_img_{split}.tar"
    kaggle = next((src / tree for tree in KAGGLE_TREES if (src / tree).is_dir()), None)
    if archive.is_file():
        source = (_train_archive if split == "train" else _val_archive)(archive, workers)
    elif kaggle is not None:
        source = _folder(src, _split_folder(kaggle, split, src), "Kaggle's ImageNet")
    else:
        other = [path.name for path in src.glob("ILSVRC2012_img_*.tar")]
        if other and not _split_folders(src):
            raise UserError(f"{src} has {', '.join(other)} but no {archive.name}")
        source = _folder(src, _split_folder(src, split, src), "image folder")
    if not len(source):
        raise UserError(
            f"{source.root} holds no images (looked for {', '.join(sorted(EXTENSIONS))})"
        )
    _compare_with_imagenet(source, split)
    return source


def _compare_with_imagenet(source: Source, split: str) -> None:
    if not all(_WNID.fullmatch(name) for name in source.classes):
        return
    expected = IMAGENET_COUNTS[split]
    if len(source) != expected or len(source.classes) != IMAGENET_CLASSES:
        source.warnings.append(
            f"{source.root} has {len(source):,} images in {len(source.classes):,} classes; "
            f"ImageNet's {split} split has {expected:,} in {IMAGENET_CLASSES:,} "
            f"(difference {len(source) - expected:+,} images, "
            f"{len(source.classes) - IMAGENET_CLASSES:+,} classes)"
        )


def _sorted_source(
    kind: str, root: Path, entries: list[Entry], classes: list[str] | None = None
) -> Source:
    if classes is None:
        classes = sorted({entry.class_name for entry in entries})
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
    )


# Folders


def _split_folder(root: Path, split: str, src: Path) -> Path:
    """The folder of the split below `root`, or `root` itself where it has no split folders."""
    found = _split_folders(root)
    if not found:
        return root
    if split not in found:
        raise UserError(f"{src} has no {split} split; it has: {', '.join(sorted(found))}")
    return found[split]


def _split_folders(root: Path) -> dict[str, Path]:
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    known = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    # Among other folders, one named "train" that has only files may be a class: railways.
    alone = all(path.name in known or path.name == "test" for path in folders)
    return {
        known[path.name]: path
        for path in folders
        if path.name in known
        and (alone or any(p.is_dir() or _VAL_NAME.match(p.name) for p in path.iterdir()))
    }


def _folder(src: Path, root: Path, kind: str) -> Source:
    entries = _list_images(root)
    if entries and all(_VAL_NAME.fullmatch(_stem(e.name)) and "/" not in e.name for e in entries):
        wnid_of, wnids = _val_labels(src)  # validation images as they come out of the tar
        entries = [e._replace(class_name=wnid_of(e.name)) for e in entries]
        return _sorted_source(kind, root, entries, wnids)

    warnings = []
    outside = [e for e in entries if "/" not in e.name]
    if outside and len(outside) < len(entries):
        entries = [e for e in entries if "/" in e.name]
        warnings.append(
            f"{len(outside):,} images lie in {root} itself, outside the class folders, "
            f"and are left out (such as {outside[0].name})"
        )
    elif outside:
        warnings.append(f"{root} has no class folders: all images get the class 'images'")
    classes = _kaggle_classes(src) if kind.startswith("Kaggle") else None
    entries = [
        e._replace(class_name=c) for e, c in zip(entries, _class_names(entries), strict=True)
    ]
    unknown = {e.class_name for e in entries} - set(classes) if classes else set()
    if unknown:
        raise UserError(f"{root} has classes that LOC_synset_mapping.txt lacks: {min(unknown)}")
    source = _sorted_source(kind, root, entries, classes)
    source.warnings += warnings
    return source


def _list_images(root: Path) -> list[Entry]:
    """All images below `root`; many threads, since a network file system answers slowly."""
    with os.scandir(root) as top:
        tops = [item for item in top if not item.name.startswith(".")]
    entries = [_entry(item, item.name) for item in tops if _is_image(item)]
    folders = [item.name for item in tops if item.is_dir()]
    todo: SimpleQueue[str] = SimpleQueue()
    answers: SimpleQueue[list[Entry] | OSError] = SimpleQueue()
    for name in folders:
        todo.put(name)

    def work() -> None:
        with suppress(Empty):
            while True:
                name = todo.get_nowait()
                try:
                    answers.put(list(_walk(root / name, name)))
                except OSError as error:
                    answers.put(error)

    # Daemons behind plain queues: Ctrl-C ends the program at any moment, which a pool may prevent.
    for _ in range(min(16, len(folders))):
        Thread(target=work, daemon=True).start()
    for _ in folders:
        answer = answers.get()
        if isinstance(answer, OSError):
            raise answer
        entries += answer
    return entries


def _walk(folder: Path, prefix: str) -> Iterator[Entry]:
    with os.scandir(folder) as items:
        for item in items:
            name = f"{prefix}/{item.name}"
            if item.name.startswith("."):
                continue
            if item.is_dir():
                yield from _walk(folder / item.name, name)
            elif _is_image(item):
                yield _entry(item, name)


def _is_image(item: os.DirEntry[str]) -> bool:
    return os.path.splitext(item.name)[1].lower() in EXTENSIONS and item.is_file()  # noqa: PTH122


def _entry(item: os.DirEntry[str], name: str) -> Entry:
    return Entry("", name, item.stat().st_size)


def _class_names(entries: list[Entry]) -> list[str]:
    """The class of each image, from its path.

    As in torchvision's ImageFolder the folder at the top is the class. Where no such folder
    holds images itself (Places: ``a/abbey``, iNaturalist: ``Aves/1234``) it is the folder that
    holds the image; a last part that all share (Tiny ImageNet: ``n01443537/images``) is dropped.
    """
    if all("/" not in e.name for e in entries):
        return ["images"] * len(entries)
    parts = [e.name.split("/")[:-1] for e in entries]
    if any(len(p) == 1 for p in parts):
        return [p[0] for p in parts]
    if len({p[-1] for p in parts}) == 1:
        return ["/".join(p[:-1]) for p in parts]
    return ["/".join(p) for p in parts]


# The official archives


def _train_archive(archive: Path, workers: int) -> Source:
    inner = [m for m in walk_tar(archive) if m.name.endswith(".tar")]
    if not inner:
        raise UserError(f"{archive} holds no tars of classes; is it ImageNet's train archive?")
    tasks = [(archive, m.name, m.offset, m.offset + m.size) for m in inner]
    entries = [entry for listed in run_all(_list_inner, tasks, workers) for entry in listed]
    classes = sorted(_stem(m.name) for m in inner)
    return _sorted_source("ImageNet's archive", archive, entries, classes)


def _list_inner(task: tuple[Path, str, int, int]) -> list[Entry]:
    archive, name, start, end = task
    wnid = _stem(name)
    return [
        Entry(wnid, f"{wnid}/{_base(m.name)}", m.size, m.offset)
        for m in walk_tar(archive, start, end, name)
        if _is_image_name(m.name)
    ]


def _val_archive(archive: Path, workers: int) -> Source:
    wnid_of, classes = _val_labels(archive.parent)
    entries = [
        Entry(wnid_of(m.name), _base(m.name), m.size, m.offset)
        for m in walk_tar(archive)
        if _is_image_name(m.name)
    ]
    return _sorted_source("ImageNet's archive", archive, entries, classes)


def _is_image_name(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


class Member(NamedTuple):
    """A file in a tar: its name, where its data begins and how long it is."""

    name: str
    offset: int
    size: int


def walk_tar(
    path: Path, start: int = 0, end: int | None = None, inner: str = "", resync: bool = False
) -> Iterator[Member]:
    """The files of a tar, or of a tar that lies in bytes [start, end) of another, by seeking.

    Args:
        inner: name of the tar in the tar, for messages.
        resync: search on for the next header after a damaged one.

    Raises:
        UserError: it is no tar, or it ends too early.
    """
    where = f"{path} ({inner})" if inner else str(path)
    try:
        with path.open("rb") as stream:
            if end is None:
                end = os.fstat(stream.fileno()).st_size
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=resync) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if member.offset_data + member.size > end:
                        raise UserError(f"{where} ends inside {member.name}: it is cut short")
                    if member.isfile():
                        yield Member(member.name, member.offset_data, member.size)
                # tarfile takes a damaged header for the end
                stream.seek(tar.offset)
                if tar.offset < end and stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise UserError(f"{where} has a damaged header at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{where} is not an intact tar: {error}") from error


# Labels of the validation images


def _val_labels(folder: Path) -> tuple[Callable[[str], str], list[str]]:
    """The wnid of a validation image by its name, and the sorted wnids."""
    truth = _devkit(folder)
    table = next(
        (p for p in (folder / "LOC_val_solution.csv", folder.parent / "LOC_val_solution.csv")
         if p.is_file()),
        None,
    )  # fmt: skip
    if truth is not None:
        wnids, classes = truth

        def from_devkit(name: str) -> str:
            match = _VAL_NAME.fullmatch(_stem(name))
            if not match or not 1 <= int(match[1]) <= len(wnids):
                raise UserError(
                    f"{name}: the devkit's ground truth has {len(wnids)} lines, none for this image"
                )
            return wnids[int(match[1]) - 1]

        return from_devkit, classes
    if table is not None:
        with table.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        try:
            by_name = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{table} is not Kaggle's table (ImageId,PredictionString)") from error

        def from_table(name: str) -> str:
            if _stem(name) not in by_name:
                raise UserError(f"{table} has no line for {name}")
            return by_name[_stem(name)]

        return from_table, _kaggle_classes(folder) or sorted(set(by_name.values()))
    raise UserError(
        f"{folder}: the validation images have no labels; put {DEVKIT}.tar.gz or "
        "LOC_val_solution.csv there, or sort them into class folders"
    )


def _kaggle_classes(folder: Path) -> list[str] | None:
    for path in (folder / "LOC_synset_mapping.txt", folder.parent / "LOC_synset_mapping.txt"):
        if path.is_file():
            return sorted(line.split()[0] for line in path.read_text().splitlines() if line.strip())
    return None


def _devkit(folder: Path) -> tuple[list[str], list[str]] | None:
    """From the devkit, packed or not: the wnid of each validation image, and the sorted wnids."""
    truth_name, meta_name = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
    packed, unpacked = folder / f"{DEVKIT}.tar.gz", folder / DEVKIT
    if packed.is_file():
        try:
            with tarfile.open(packed, "r:gz") as tar:
                members = {
                    name: tar.extractfile(member).read()  # type: ignore[union-attr]
                    for member in tar
                    for name in (truth_name, meta_name)
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}")
                }
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{packed} is not an intact archive: {error}") from error
        if set(members) != {truth_name, meta_name}:
            raise UserError(f"{packed} lacks {truth_name} or {meta_name}")
        truth, meta = members[truth_name], members[meta_name]
    elif (unpacked / meta_name).is_file() and (unpacked / truth_name).is_file():
        truth, meta = (unpacked / truth_name).read_bytes(), (unpacked / meta_name).read_bytes()
    else:
        return None
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    leaf = synsets["num_children"] == 0  # the file also lists the 860 synsets above the classes
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets[leaf]}
    try:
        return [wnid[int(line)] for line in truth.split()], sorted(wnid.values())
    except KeyError as error:
        raise UserError(f"{folder}: the devkit's meta.mat has no class {error}") from error


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
