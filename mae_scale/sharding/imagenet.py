"""ImageNet's official archives, and the labels of its validation images."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from mae_scale.data.formats import is_image_name
from mae_scale.errors import UserError
from mae_scale.sharding.listing import Entry, Source, sorted_source
from mae_scale.sharding.processes import run_all
from mae_scale.sharding.tars import walk_tar

COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def compare_with_imagenet(source: Source, split: str) -> None:
    """Warn if the classes are ImageNet's and the numbers of images are not."""
    if not source.classes or not all(WNID.fullmatch(name) for name in source.classes):
        return
    expected = COUNTS[split]
    if len(source) != expected or len(source.classes) != CLASSES:
        source.warnings.append(
            f"{source.root} has {len(source):,} images in {len(source.classes):,} classes; "
            f"ImageNet's {split} split has {expected:,} in {CLASSES:,} "
            f"(difference {len(source) - expected:+,} images, "
            f"{len(source.classes) - CLASSES:+,} classes)"
        )


def train_archive(archive: Path, workers: int) -> Source:
    """List the images in ``ILSVRC2012_img_train.tar``, which holds one tar for each class."""
    inner = [m for m in walk_tar(archive) if m.name.endswith(".tar") and not m.problem]
    if not inner:
        raise UserError(f"{archive} holds no tars of classes; is it ImageNet's train archive?")
    tasks = [(archive, m.name, m.offset, m.offset + m.size) for m in inner]
    entries = [entry for listed in run_all(_list_inner, tasks, workers) for entry in listed]
    classes = sorted(stem_of(m.name) for m in inner)
    return sorted_source("ImageNet's archive", archive, entries, classes)


def _list_inner(task: tuple[Path, str, int, int]) -> list[Entry]:
    archive, name, start, end = task
    wnid = stem_of(name)
    return [
        Entry(wnid, f"{wnid}/{base_of(m.name)}", m.size, m.offset)
        for m in walk_tar(archive, start, end, name)
        if is_image_name(m.name) and not m.problem
    ]


def val_archive(archive: Path, workers: int) -> Source:
    """List the images in ``ILSVRC2012_img_val.tar``; their labels lie beside it."""
    wnid_of, classes = val_labels(archive.parent)
    entries = [
        Entry(wnid_of(m.name), base_of(m.name), m.size, m.offset)
        for m in walk_tar(archive)
        if is_image_name(m.name) and not m.problem
    ]
    return sorted_source("ImageNet's archive", archive, entries, classes)


# Labels of the validation images


def val_labels(folder: Path) -> tuple[Callable[[str], str], list[str]]:
    """Return a function from a validation image's name to its WordNet id, and the sorted ids.

    Args:
        folder: folder of the images; the labels lie in it or above it.

    Raises:
        UserError: there are no labels.
    """
    above = _above(folder)
    truth = next(filter(None, map(_devkit, above)), None)
    table = next((p for f in above if (p := f / "LOC_val_solution.csv").is_file()), None)
    if truth is not None:
        wnids, classes = truth

        def from_devkit(name: str) -> str:
            match = VAL_NAME.fullmatch(stem_of(name))
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
            if stem_of(name) not in by_name:
                raise UserError(f"{table} has no line for {name}")
            return by_name[stem_of(name)]

        return from_table, kaggle_classes(folder) or sorted(set(by_name.values()))
    raise UserError(
        f"{folder}: the validation images have no labels; put {DEVKIT}.tar.gz or "
        "LOC_val_solution.csv into this folder or the one above, or sort them into class folders"
    )


def kaggle_classes(folder: Path) -> list[str] | None:
    """Read the sorted classes from Kaggle's LOC_synset_mapping.txt in this folder or above it.

    Returns:
        WordNet ids of the classes; None if the file is missing.
    """
    for path in (above / "LOC_synset_mapping.txt" for above in _above(folder)):
        if path.is_file():
            return sorted(line.split()[0] for line in path.read_text().splitlines() if line.strip())
    return None


def _above(folder: Path) -> list[Path]:
    """Return a folder and the four above it: Kaggle's images lie that deep below its tables."""
    return [folder, *list(folder.absolute().parents)[:4]]


def _devkit(folder: Path) -> tuple[list[str], list[str]] | None:
    """Read each validation image's WordNet id, and the sorted ids, from tar or folder."""
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
        except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
            raise UserError(f"{packed} is not an intact archive: {error}") from error
        if set(members) != {truth_name, meta_name}:
            raise UserError(f"{packed} lacks {truth_name} or {meta_name}")
        truth, meta = members[truth_name], members[meta_name]
    elif (unpacked / meta_name).is_file() and (unpacked / truth_name).is_file():
        truth, meta = (unpacked / truth_name).read_bytes(), (unpacked / meta_name).read_bytes()
    else:
        return None
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaf = synsets["num_children"] == 0  # the file also lists the 860 synsets above the classes
        wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets[leaf]}
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise UserError(
            f"{folder}: the devkit's meta.mat cannot be read ({type(error).__name__}: {error})"
        ) from error
    try:
        return [wnid[int(line)] for line in truth.split()], sorted(wnid.values())
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder}: the devkit's meta.mat has no class {error}") from error


def base_of(name: str) -> str:
    """Return the file name at the end of a path."""
    return name.rpartition("/")[2]


def stem_of(name: str) -> str:
    """Return the file name at the end of a path, without its suffix."""
    return PurePosixPath(name).stem
