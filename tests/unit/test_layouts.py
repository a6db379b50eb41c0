"""Folders as people have them: each lands right, or is refused in one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mae_scale.errors import UserError
from mae_scale.sharding.sources import Choice, Source, find_source


def jpg(i: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (i * 7 % 256, 9, 9)).save(stream, "JPEG")
    return stream.getvalue()


def tree(root: Path, *paths: str) -> Path:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpg(i))
    return root


def counts(source: Source) -> dict[str, int]:
    names = [source.classes[label] for label in source.labels.tolist()]
    return {name: names.count(name) for name in source.classes}


TRAIN_X = [f"train.X{n}/{c}/{k}.jpg" for n in (1, 2) for c in "ab" for k in "12"]
TINY_VAL = [f"val/images/val_{i}.JPEG" for i in range(4)]

LANDS: dict[str, tuple[list[str], str, dict[str, int]]] = {
    "parts of a split": ([*TRAIN_X, "val.X/a/1.jpg", "val.X/b/1.jpg"], "train", {"a": 4, "b": 4}),
    "its validation": ([*TRAIN_X, "val.X/a/1.jpg", "val.X/b/1.jpg"], "val", {"a": 1, "b": 1}),
    "capitals": (["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/2.jpg"], "train", {"a": 1, "b": 1}),
    "other words": (["training/a/1.jpg", "validation/a/1.jpg", "validation/b/1.jpg"], "val",
                    {"a": 1, "b": 1}),
    "archives unpacked": (
        ["ILSVRC2012_img_train/n01/1.jpg", "ILSVRC2012_img_train/n02/1.jpg",
         "ILSVRC2012_img_val/n01/1.jpg"], "train", {"n01": 1, "n02": 1}),
    "a year": (["train2017/a/1.jpg", "val2017/a/1.jpg", "val2017/b/1.jpg"], "val",
               {"a": 1, "b": 1}),
    "a stray image": (["a/abbey/1.jpg", "a/bar/1.jpg", "b/x/1.jpg", "a/t.jpg"], "train",
                      {"a/abbey": 1, "a/bar": 1, "b/x": 1}),
    "a class train": (["train/steam/1.jpg", "train/2.jpg", "bus/1.jpg", "car/1.jpg"], "train",
                      {"bus": 1, "car": 1, "train": 2}),
    "a class train of folders": (["train/steam/1.jpg", "bus/1.jpg", "car/1.jpg"], "train",
                                 {"bus": 1, "car": 1, "train": 1}),
    "unknown to ImageNet": (["a/1.bmp", "b/2.gif", "b/3.jfif"], "train", {"a": 1, "b": 2}),
    "accents": (["Cafe\u0301/1.jpg", "Caf\u00e9/2.jpg", "x/1.jpg"], "train",
                {"Caf\u00e9": 2, "x": 1}),
    "classes that speak of splits": (["bullet_train/1.jpg", "freight_train/2.jpg"], "train",
                                     {"bullet_train": 1, "freight_train": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", LANDS)
def test_layouts_land_right(name: str, tmp_path: Path) -> None:
    paths, split, expected = LANDS[name]
    assert counts(find_source(tree(tmp_path, *paths), split)) == expected


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "masks": (["images/1.jpg", "annotations/trimaps/1.png"], "train", "masks or annotations"),
    "masks in a split": (["train/images/1.jpg", "train/masks/1.png"], "train", "masks"),
    "a missing split": (["train/a/1.jpg", "test/a/1.jpg"], "val", "no val split"),
    "flat validation": (["train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"], "val", "--list"),
    "splits or classes": (["train/a/1.jpg", "holdout/a/1.jpg"], "train", "splits or classes"),
    "strange words": (["train_ab/a/1.jpg", "train_cd/a/1.jpg"], "train", "splits or classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    paths, split, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        find_source(tree(tmp_path, *paths), split)
    assert "\n" not in str(caught.value)


def test_what_was_taken_is_said(tmp_path: Path) -> None:
    source = find_source(tree(tmp_path, *(f"{c}/{k}.jpg" for c in "abcd" for k in "12")), "train")
    assert source.taken == "all 8 images as train; 4 classes: a, b, c, …"
    one = find_source(tree(tmp_path / "one", "x/1.jpg"), "train")
    assert "one class" in one.warnings[-1]


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    src = tree(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.heic", "b/x.psd")
    (src / "b/broken.jpg").symlink_to("nowhere")
    (src / "a/loop").symlink_to("..")
    warnings = "\n".join(find_source(src, "train").warnings)
    for words in ("broken link (such as b/broken.jpg)", "(.heic) (such as c/3.heic)", "x.psd",
                  "link to a folder that it lies in", "1 folders", ": c"):  # fmt: skip
        assert words in warnings


def test_tiny_imagenet(tmp_path: Path) -> None:
    src = tree(tmp_path, *TINY_VAL, *(f"train/n{c}/images/{i}.JPEG" for c in "12" for i in "34"))
    lines = [f"val_{i}.JPEG\tn{i % 2 + 1}\t0\t0\t9\t9\n" for i in range(4)]
    (src / "val/val_annotations.txt").write_text("".join(lines))
    assert counts(find_source(src, "val")) == {"n1": 2, "n2": 2}
    assert counts(find_source(src, "train")) == {"n1": 2, "n2": 2}


def test_pets_and_food(tmp_path: Path) -> None:
    pets = tree(tmp_path / "pets", "images/Abyssinian_1.jpg", "images/beagle_dog_2.jpg",
                "images/beagle_dog_3.jpg", "annotations/trimaps/beagle_dog_2.png")  # fmt: skip
    (pets / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_dog_2 2 2 1\n")
    (pets / "annotations/test.txt").write_text("beagle_dog_3 2 2 1\n")
    assert counts(find_source(pets, "train")) == {"Abyssinian": 1, "beagle_dog": 1}
    assert counts(find_source(pets, "val")) == {"beagle_dog": 1}
    food = tree(tmp_path / "food", "images/pie/1.jpg", "images/pie/2.jpg", "images/soup/3.jpg")
    (food / "meta").mkdir()
    (food / "meta/train.txt").write_text("pie/1\nsoup/3\n")
    (food / "meta/test.txt").write_text("pie/2\n")
    assert counts(find_source(food, "train")) == {"pie": 1, "soup": 1}
    assert counts(find_source(food, "val")) == {"pie": 1}


def test_lists(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", "n1/n1_1.JPEG", "n1/n1_2.JPEG", "n2/n2_1.JPEG", "n2/n2_2.JPEG")

    def listed(text: str, **choice: object) -> dict[str, int]:
        (tmp_path / "list").write_text(text)
        source = find_source(src, "train", choice=Choice(tmp_path / "list", **choice))
        return {k: v for k, v in counts(source).items() if v}

    assert listed("n1_1.JPEG\nn2_2.JPEG\n") == {"n1": 1, "n2": 1}
    assert listed("train/n1/n1_1.JPEG\n/n2/n2_1\n") == {"n1": 1, "n2": 1}
    assert listed("filename,label\nn1_1.JPEG,cat\nn1_2.JPEG,dog\n") == {"cat": 1, "dog": 1}
    assert listed("n1_1.JPEG 0\nn2_1.JPEG 1\nn2_2.JPEG 1\n") == {"0": 1, "1": 2}
    assert listed("n1_1.JPEG 1\nn2_1.JPEG 0\n", classes=["x", "y"]) == {"x": 1, "y": 1}
    with pytest.raises(UserError, match="none of the 1 images"):
        listed("other.jpg\n")
    with pytest.raises(UserError, match="in 1 of 2 lines only"):
        listed("n1_1.JPEG 1\nn2_1.JPEG\n")


def test_classes_depth_and_a_share(tmp_path: Path) -> None:
    src = tree(tmp_path, *(f"{c}/{d}/{k}.jpg" for c in "ab" for d in "xy" for k in range(10)))
    some = find_source(src, "train", choice=Choice(classes=["b/y", "a/x", "none"]))
    assert counts(some) == {"b/y": 10, "a/x": 10, "none": 0}
    assert "1 of 3 classes have no images" in some.warnings[-1]
    assert counts(find_source(src, "train", choice=Choice(class_depth=1))) == {"a": 20, "b": 20}
    parts = {}
    for split in ("train", "val"):
        source = find_source(src, split, choice=Choice(val_share=0.2, seed=3))
        parts[split] = set(source.names)
        assert set(counts(source).values()) == {8 if split == "train" else 2}
        assert [source.read(i) for i in range(3)]
    assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 40
    other = find_source(src, "val", choice=Choice(val_share=0.2, seed=4))
    assert set(other.names) != parts["val"]


def write_tar(path: Path, names: list[str], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i, name in enumerate(names):
            info, data = tarfile.TarInfo(name), jpg(i)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    for wnid in ("n1", "n2", "n3"):
        write_tar(tmp_path / "src" / f"{wnid}.tar", [f"{wnid}_{i}.JPEG" for i in range(3)])
    source = find_source(tmp_path / "src", "train", workers=2)
    assert counts(source) == {"n1": 3, "n2": 3, "n3": 3}
    assert [source.read(i) for i in range(9)] == [jpg(i) for i in (0, 1, 2)] * 3
    write_tar(tmp_path / "wds" / "000.tar", ["1.jpg", "1.cls"])
    write_tar(tmp_path / "wds" / "001.tar", ["2.jpg", "2.cls"])
    with pytest.raises(UserError, match="mae-scale index"):
        find_source(tmp_path / "wds", "train")


def test_compressed_tars_of_hugging_face(tmp_path: Path) -> None:
    names = [f"n0144076{i}_{i}_n0144076{i}.JPEG" for i in range(3)]
    for part in range(2):
        write_tar(tmp_path / "src" / "data" / f"train_images_{part}.tar.gz", names, "w:gz")
    write_tar(
        tmp_path / "src" / "data" / "val_images.tar.gz", ["ILSVRC2012_val_1_n01440764.JPEG"], "w:gz"
    )
    source = find_source(tmp_path / "src", "train", work=tmp_path / "work")
    assert counts(source) == {f"n0144076{i}": 2 for i in range(3)}
    assert source.read(0) == jpg(0)
    source = find_source(tmp_path / "src", "val", work=tmp_path / "work")
    assert counts(source) == {"n01440764": 1}


@pytest.mark.parametrize("named", [True, False])
def test_parquet(tmp_path: Path, named: bool) -> None:
    import json

    import pyarrow
    from pyarrow import parquet

    rows = [{"image": {"bytes": jpg(i), "path": f"{i}.jpg"}, "label": i % 3} for i in range(200)]
    table = pyarrow.Table.from_pylist(rows)
    if named:
        features = {"label": {"names": ["tench", "eel", "ray"], "_type": "ClassLabel"}}
        facts = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": facts})
    (tmp_path / "src" / "data").mkdir(parents=True)
    parquet.write_table(
        table, tmp_path / "src/data/train-00000-of-00001.parquet", row_group_size=50
    )
    source = find_source(tmp_path / "src", "train", work=tmp_path / "work")
    names = ["tench", "eel", "ray"] if named else ["0", "1", "2"]
    assert list(counts(source)) == names and sum(counts(source).values()) == 200
    assert source.read(0) == jpg(0)
    with pytest.raises(UserError, match="no val split"):
        find_source(tmp_path / "src", "val", work=tmp_path / "work")
    (tmp_path / "src/data/train-00000-of-00001.parquet").write_bytes(b"PAR1 spoilt")
    with pytest.raises(UserError, match="not an intact parquet file"):
        find_source(tmp_path / "src", "train", work=tmp_path / "work")
