"""Finding the same images in every form in which people have them."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mae_scale.errors import UserError
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.sharding.sources import Source, find_source

WNIDS = 5  # classes in these tests
PER_CLASS = 4


@pytest.fixture(scope="module")
def photos(imagenet_tree: Path) -> dict[str, dict[str, bytes]]:
    """Give {wnid: {file name: JPEG}} of the train split."""
    files = iter(sorted(imagenet_tree.glob("*/*")))
    wnids = sorted(path.name for path in imagenet_tree.iterdir())[::50]
    return {
        wnid: {f"{wnid}_{n * 17}.JPEG": next(files).read_bytes() for n in range(PER_CLASS)}
        for wnid in wnids
    }


@pytest.fixture(scope="module")
def val(photos: dict[str, dict[str, bytes]]) -> dict[str, tuple[str, bytes]]:
    """Give {file name: (wnid, JPEG)} of the val split, with mixed classes."""
    pairs = [(wnid, data) for wnid, images in photos.items() for data in images.values()]
    pairs = pairs[::3] + pairs[1::3] + pairs[2::3]
    return {f"ILSVRC2012_val_{n:08d}.JPEG": pair for n, pair in enumerate(pairs, 1)}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uname = len(data), 1_300_000_000, "imagenet"
    tar.addfile(info, io.BytesIO(data))


def train_archive(folder: Path, photos: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in sorted(photos, reverse=True):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for name, data in reversed(photos[wnid].items()):
                    add(inner, name, data)
            add(outer, f"{wnid}.tar", stream.getvalue())
    return folder


def devkit(folder: Path, val: dict[str, tuple[str, bytes]], packed: bool = True) -> None:
    """Write a devkit: its meta.mat lists classes in another order than wnids sort, and synsets
    above."""
    wnids = sorted({wnid for wnid, _ in val.values()})
    ids = {wnid: i for i, wnid in enumerate([*wnids[2:], *wnids[:2]], 1)}
    rows: list[tuple] = [
        (n, wnid, "words", "gloss", 0, [], 1, 1300)
        for wnid, n in sorted(ids.items(), key=lambda x: x[1])
    ]
    rows += [(1000 + n, f"n9999999{n}", "above", "gloss", 3, [1, 2, 3], 2, 0) for n in range(3)]
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    names += ["wordnet_height", "num_train_images"]
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[wnid]}\n" for _, (wnid, _) in sorted(val.items()))
    files = {
        "data/meta.mat": meta.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        "readme.txt": b"read me",
    }
    if packed:
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                add(tar, f"ILSVRC2012_devkit_t12/{name}", data)
    else:
        for name, data in files.items():
            path = folder / "ILSVRC2012_devkit_t12" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def val_archive(folder: Path, val: dict[str, tuple[str, bytes]]) -> Path:
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, (_, data) in reversed(val.items()):
            add(tar, name, data)
    return folder


def train_tree(folder: Path, photos: dict[str, dict[str, bytes]]) -> Path:
    for wnid, images in photos.items():
        (folder / wnid).mkdir(parents=True)
        for name, data in images.items():
            (folder / wnid / name).write_bytes(data)
    return folder


def val_tree(folder: Path, val: dict[str, tuple[str, bytes]]) -> Path:
    for name, (wnid, data) in val.items():
        (folder / wnid).mkdir(parents=True, exist_ok=True)
        (folder / wnid / name).write_bytes(data)
    return folder


def val_flat(folder: Path, val: dict[str, tuple[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    for name, (_, data) in val.items():
        (folder / name).write_bytes(data)
    return folder


def kaggle_tables(folder: Path, val: dict[str, tuple[str, bytes]]) -> None:
    wnids = sorted({wnid for wnid, _ in val.values()})
    rows = [f"{name[:-5]},{wnid} 1 2 30 40 {wnid} 5 6 70 80 " for name, (wnid, _) in val.items()]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    lines = [f"{wnid} some, words\n" for wnid in wnids]
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines))


def as_rows(source: Source) -> list[tuple[str, str, int, bytes]]:
    return [
        (source.file_name(i), source.classes[label], label, source.read(i))
        for i, label in enumerate(source.labels.tolist())
    ]


def expected_train(photos: dict[str, dict[str, bytes]]) -> list[tuple[str, str, int, bytes]]:
    return [
        (name, wnid, label, data)
        for label, wnid in enumerate(sorted(photos))
        for name, data in sorted(photos[wnid].items())
    ]


def expected_val(val: dict[str, tuple[str, bytes]]) -> list[tuple[str, str, int, bytes]]:
    wnids = sorted({wnid for wnid, _ in val.values()})
    rows = [(name, wnid, wnids.index(wnid), data) for name, (wnid, data) in val.items()]
    return sorted(rows, key=lambda row: (row[2], row[0]))


def test_every_form_of_the_train_split_is_the_same(photos, val, tmp_path: Path) -> None:
    forms = {}
    for name in ("archive", "kaggle", "tree", "split"):
        (tmp_path / name).mkdir()
    forms["archive"] = train_archive(tmp_path / "archive", photos)
    train_tree(tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC" / "train", photos)
    kaggle_tables(tmp_path / "kaggle", val)
    forms["kaggle"] = tmp_path / "kaggle"
    forms["inside kaggle"] = tmp_path / "kaggle" / "ILSVRC"
    forms["tree"] = train_tree(tmp_path / "tree", photos)
    train_tree(tmp_path / "split" / "train", photos)
    val_tree(tmp_path / "split" / "val", val)
    forms["split"] = tmp_path / "split"
    prints = set()
    for name, src in forms.items():
        source = find_source(src, "train", workers=2)
        assert as_rows(source) == expected_train(photos), name
        prints.add(source.fingerprint())
    assert len(prints) == 1

    bytes_of = {}
    for name in ("archive", "kaggle", "split"):
        out = tmp_path / f"out {name}"
        options = Options("train", samples_per_shard=7)
        assert shard(forms[name], out, options, workers=2) == 0
        bytes_of[name] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert bytes_of["archive"] == bytes_of["kaggle"] == bytes_of["split"]


def test_every_form_of_the_val_split_is_the_same(photos, val, tmp_path: Path) -> None:
    forms = {}
    for name in ("packed", "unpacked", "kaggle", "sorted kaggle", "flat", "flat table"):
        (tmp_path / name).mkdir()
    forms["packed"] = val_archive(tmp_path / "packed", val)
    devkit(tmp_path / "packed", val)
    forms["unpacked"] = val_archive(tmp_path / "unpacked", val)
    devkit(tmp_path / "unpacked", val, packed=False)
    for name, make in (("kaggle", val_flat), ("sorted kaggle", val_tree)):
        make(tmp_path / name / "ILSVRC" / "Data" / "CLS-LOC" / "val", val)
        train_tree(tmp_path / name / "ILSVRC" / "Data" / "CLS-LOC" / "train", photos)
        kaggle_tables(tmp_path / name, val)
        forms[name] = tmp_path / name
    forms["inside kaggle"] = tmp_path / "kaggle" / "ILSVRC"
    val_flat(tmp_path / "flat" / "val", val)
    devkit(tmp_path / "flat", val)
    forms["flat"] = tmp_path / "flat"
    val_flat(tmp_path / "flat table" / "val", val)
    kaggle_tables(tmp_path / "flat table", val)
    forms["flat table"] = tmp_path / "flat table"
    forms["tree"] = val_tree(tmp_path / "tree" / "val", val).parent
    for name, src in forms.items():
        assert as_rows(find_source(src, "val")) == expected_val(val), name


def test_counts_are_compared_where_the_source_is_imagenet(photos, val, tmp_path: Path) -> None:
    (warning,) = find_source(train_archive(tmp_path, photos), "train").warnings
    assert "1,281,167 in 1,000 (difference -1,281,147 images, -995 classes)" in warning
    val_archive(tmp_path, val)
    devkit(tmp_path, val)
    (warning,) = find_source(tmp_path, "val").warnings
    assert "50,000 in 1,000 (difference -49,980 images, -995 classes)" in warning
    other = tmp_path / "pets"
    train_tree(other, {"beagle": photos[min(photos)]})
    (warning,) = find_source(other, "train").warnings
    assert "all images are of one class, beagle" in warning


def make_files(folder: Path, photo: bytes, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo)
    return folder


def test_any_folder_of_class_folders(photos, tmp_path: Path) -> None:
    photo = next(iter(photos[min(photos)].values()))
    cases: dict[str, tuple[list[str], list[str]]] = {
        "extensions": (
            ["a/1.jpg", "a/2.JPG", "b/3.jpeg", "b/4.PNG", "b/5.webp", "c/notes.txt", "a/._1.jpg"],
            ["a/1.jpg", "a/2.JPG", "b/3.jpeg", "b/4.PNG", "b/5.webp"],
        ),
        "folders in classes": (["a/x/1.jpg", "a/y/2.jpg", "a/3.jpg", "b/4.jpg"],) * 2,
    }
    for name, (files, images) in cases.items():
        source = find_source(make_files(tmp_path / name, photo, *files), "train")
        assert sorted(source.names) == sorted(images), name
        assert source.classes == ["a", "b"], name
    places = make_files(
        tmp_path / "places", photo, "a/abbey/1.jpg", "a/arch/2.jpg", "b/bar/in/3.jpg"
    )
    assert find_source(places, "train").classes == ["a/abbey", "a/arch", "b/bar/in"]
    tiny = make_files(tmp_path / "tiny", photo, "train/n1/images/1.jpg", "train/n2/images/2.jpg")
    assert find_source(tiny, "train").classes == ["n1", "n2"]
    flat = find_source(make_files(tmp_path / "flat", photo, "1.jpg", "2.jpg"), "train")
    assert flat.classes == ["images"] and "no class folders" in flat.warnings[0]
    vehicles = make_files(tmp_path / "vehicles", photo, "car/1.jpg", "train/2.jpg", "bus/3.jpg")
    assert find_source(vehicles, "train").classes == ["bus", "car", "train"]
    mixed = find_source(make_files(tmp_path / "mixed", photo, "1.jpg", "a/2.jpg"), "train")
    assert mixed.names == ["a/2.jpg"] and "outside the class folders" in mixed.warnings[0]


def test_bad_sources(photos, val, tmp_path: Path) -> None:
    def error(src: Path, split: str) -> str:
        with pytest.raises(UserError) as caught:
            find_source(src, split)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    src = tmp_path / "archives"
    src.mkdir()
    val_archive(src, val)
    assert "no ILSVRC2012_img_train.tar" in error(src, "train")
    assert "ILSVRC2012_devkit_t12.tar.gz" in error(src, "val")
    (src / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"spoilt")
    assert "not an intact archive" in error(src, "val")
    train_archive(src, photos)
    archive = src / "ILSVRC2012_img_train.tar"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in error(src, "train")
    archive.write_bytes(b"no tar" * 1000)
    assert "not an intact tar" in error(src, "train")
    for offset in (512, whole.index(b"_17.JPEG") - 9):  # headers in the first inner tar
        damaged = bytearray(whole)
        damaged[offset : offset + 5] = b"xxxxx"
        archive.write_bytes(damaged)
        assert "not an intact tar" in (message := error(src, "train")) or "damaged" in message

    val_flat(tmp_path / "flat", {name: val[name] for name in sorted(val)[:3]})
    assert "have no labels" in error(tmp_path / "flat", "val")
    shutil.rmtree(src)
    src.mkdir()
    val_archive(src, {**val, "ILSVRC2012_val_00050001.JPEG": val[min(val)]})
    devkit(src, val)
    assert "none for this image" in error(src, "val")


def test_a_damaged_devkit_gets_a_line(val, tmp_path: Path) -> None:
    """Wherever the archive, meta.mat or the list of labels is damaged: one line, or the labels."""
    val_archive(tmp_path, val)
    devkit(tmp_path, val, packed=False)
    devkit(tmp_path, val)
    unpacked, packed = (tmp_path / f"ILSVRC2012_devkit_t12{end}" for end in ("", ".tar.gz"))
    refused = 0
    files = [packed, unpacked / "data/meta.mat"]
    files.append(unpacked / "data/ILSVRC2012_validation_ground_truth.txt")
    for file in files:
        whole = file.read_bytes()
        for offset in range(0, len(whole), max(1, len(whole) // 60)):
            for spoilt in (whole[:offset], whole[:offset] + b"\xff\xfe" + whole[offset + 2 :]):
                file.write_bytes(spoilt)
                try:
                    find_source(tmp_path, "val")
                except UserError as error:
                    refused += 1
                    assert "\n" not in str(error)
        file.write_bytes(whole)
        packed.unlink(missing_ok=True)  # the folder is read where there is no archive
    assert refused > 100


def test_a_file_that_changes_is_an_error(photos, tmp_path: Path) -> None:
    source = find_source(train_tree(tmp_path / "src", photos), "train")
    path = source.root / source.names[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="changed while"):
        source.read(0)
