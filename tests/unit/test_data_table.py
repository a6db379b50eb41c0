"""Each row of the table «what I have, what I type» of docs/data.md, on a small set of that kind."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from make_trees import jpg, tree
from pyarrow import parquet
from test_sources import devkit, kaggle_tables, train_archive, val_archive

from mae_scale.cli import main
from mae_scale.data.shards import open_shards
from mae_scale.sharding.verify import verify

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(mae-scale .+?)` \|$", PAGE.split("## Making shards")[0], re.M)


def tar(path: Path, names: list[str], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as stream:  # type: ignore[call-overload]
        for i, name in enumerate(names):
            data = b"%d" % (i // 2) if name.endswith("cls") else jpg(i)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))


WNIDS = ["n01440764", "n01443537"]
PHOTOS = {wnid: {f"{wnid}_{i}.JPEG": jpg(i) for i in range(3)} for wnid in WNIDS}
VAL = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": (WNIDS[i % 2], jpg(i)) for i in range(4)}


def archives(src: Path) -> None:
    train_archive(src, PHOTOS)
    val_archive(src, VAL)
    devkit(src, VAL)


def kaggle(src: Path) -> None:
    root = src / "ILSVRC/Data/CLS-LOC"
    tree(root, *(f"train/{wnid}/{name}" for wnid in WNIDS for name in PHOTOS[wnid]))
    tree(root, *(f"val/{name}" for name in VAL))
    kaggle_tables(src, VAL)


def both_splits(src: Path, **images: int) -> None:
    for split, n in images.items():
        names = [f"{i}.{s}" for i in range(n) for s in ("jpg", "cls")]
        tar(src / f"imagenet1k-{split}-00.tar", names)


def hugging_face_tars(src: Path) -> None:
    tar(src / "data/train_images_0.tar.gz", [f"{w}_{i}_{w}.JPEG" for w in WNIDS for i in "123"],
        "w:gz")  # fmt: skip


def hugging_face_parquet(src: Path) -> None:
    rows = [{"image": {"bytes": jpg(i), "path": f"{i}.jpg"}, "label": i % 2} for i in range(6)]
    (src / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), src / "data/train-00000-of-00001.parquet")


def tiny(src: Path) -> None:
    tree(src, *(f"train/{w}/images/{i}.JPEG" for w in WNIDS for i in "123"), "val/images/0.JPEG")
    (src / "val/val_annotations.txt").write_text(f"0.JPEG\t{WNIDS[0]}\t0\t0\t9\t9\n")


def food(src: Path) -> None:
    tree(src, *(f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in "1234"))
    (src / "meta").mkdir()
    (src / "meta/train.txt").write_text("pie/1\npie/2\npie/3\nsoup/1\nsoup/2\nsoup/3\n")
    (src / "meta/test.txt").write_text("pie/4\nsoup/4\n")


def pets(src: Path) -> None:
    names = [f"{c}_{i}" for c in ("Abyssinian", "beagle") for i in "123"]
    tree(src, *(f"images/{n}.jpg" for n in names), "annotations/trimaps/beagle_1.png")
    (src / "annotations/trainval.txt").write_text("".join(f"{n} 1 1 1\n" for n in names))
    (src / "annotations/test.txt").write_text("")


def birds(src: Path) -> None:
    names = [f"{c}/{c}_{i}.jpg" for c in ("001.Albatross", "002.Auklet") for i in "123"]
    tree(src / "CUB_200_2011", *(f"images/{name}" for name in names))
    tree(src, "segmentations/001.Albatross/1.png")
    for table, lines in {"images": names, "train_test_split": ["1"] * 6}.items():
        text = "".join(f"{i} {line}\n" for i, line in enumerate(lines, 1))
        (src / "CUB_200_2011" / f"{table}.txt").write_text(text)


def species(src: Path) -> None:
    names = [f"train_val2018/Aves/{c}/{c}{i}.jpg" for c in (2, 10) for i in range(4)]
    tree(src, *names)
    chosen = [{"id": i, "file_name": n} for i, n in enumerate(names) if not n.endswith("3.jpg")]
    labels = [{"image_id": c["id"], "category_id": int(c["id"] > 3)} for c in chosen]
    (src.parent / "train2018.json").write_text(
        json.dumps({"images": chosen, "annotations": labels})
    )


def flat_with_list(src: Path) -> None:
    tree(src, *(f"Places365_val_{i}.jpg" for i in range(6)))
    lines = (f"Places365_val_{i}.jpg {i % 2}\n" for i in range(6))
    (src.parent / "val.txt").write_text("".join(lines))


MAKE: dict[str, Callable[[Path], object]] = {
    "ImageNet's archives": archives,
    "ImageNet from Kaggle": kaggle,
    "ImageNet from Hugging Face": hugging_face_tars,
    "a Hugging Face data set": hugging_face_parquet,
    "ImageNet-100": lambda src: tree(src, "val.X/a/1.jpg", *(f"train.X{n}/{c}/{n}.jpg"
                                                             for n in "123" for c in "ab")),
    "ImageNet-21k": lambda src: [tar(src / f"{w}.tar", [f"{w}_{i}.JPEG" for i in "123"])
                                 for w in WNIDS],
    "Tiny ImageNet": tiny,
    "Food-101": food,
    "Oxford-IIIT Pets": pets,
    "CUB-200-2011": birds,
    "iNaturalist 2018": species,
    "folders of classes below": lambda src: tree(src, *(f"{s}/{c}/{i}.jpg" for s in ("train", "val")
                                                        for c in "ab" for i in "123")),
    "folders of classes and no": lambda src: tree(src, *(f"{c}/{i}.jpg" for c in "ab"
                                                         for i in range(3))),
    "folders in folders": lambda src: tree(src, *(f"{c}/{d}/{d}{i}.jpg" for c in "ab" for d in "x"
                                                  for i in "123")),
    "1 % or 10 %": lambda src: (
        tree(src, *(f"train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in "12345")),
        (src.parent / "1percent.txt").write_text(
            "".join(f"{w}_{i}.JPEG\n" for w in WNIDS for i in "123")),
    ),
    "images in one folder": flat_with_list,
    "some classes": lambda src: (
        tree(src, *(f"{c}/{i}.jpg" for c in "abcd" for i in "123")),
        (src.parent / "classes.txt").write_text("d\nb\n"),
    ),
    "WebDataset tars on": lambda src: tar(
        src / "0.tar", [f"{i}.{s}" for i in range(6) for s in ("jpg", "cls")]),
    "the Hub's ImageNet": lambda src: both_splits(src, train=6, validation=2),
    "and its validation": lambda src: both_splits(src, train=2, validation=6),
    "WebDataset tars whose": lambda src: tar(
        src / "0.tar", [f"{i}.{s}.jpg" for i in range(6) for s in ("input", "target")]),
}  # fmt: skip


@pytest.mark.parametrize(("have", "command"), ROWS, ids=[have for have, _ in ROWS])
def test_each_row_lands_right(
    have: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    src = tmp_path / "SRC"
    src.mkdir()
    (make,) = (make for start, make in MAKE.items() if have.startswith(start))
    make(src)
    if "TRAIN_OUT" in command:
        tree(tmp_path / "TRAIN", "airfield/1.jpg", "zoo/2.jpg")
        assert main(["shard", "TRAIN", "TRAIN_OUT", "--split", "train"]) == 0
    assert main(shlex.split(command)[1:]) == 0
    out = tmp_path / ("OUT" if "OUT" in command.split() else "SRC")
    shards = open_shards(out)
    assert len(shards) == 6  # a tenth of three images, for validation, is none
    if "index" not in command:
        assert len(shards.classes) == 2
        assert sorted(shards.index["label"].tolist()) == [0, 0, 0, 1, 1, 1]
    assert verify(out).problems == []
    assert not (out / ".sharding").exists()


def test_the_table_is_whole() -> None:
    assert len(ROWS) == len(MAKE)
