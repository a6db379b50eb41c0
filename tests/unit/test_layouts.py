"""Folders as people have them: each is understood, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from make_trees import counts, tree
from scipy.io import savemat

from mae_scale.errors import UserError
from mae_scale.sharding.lists import read_classes
from mae_scale.sharding.sources import Choice, find_source

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
    "German": (["Training/a/1.jpg", "Validierung/a/1.jpg", "Validierung/b/2.jpg"], "val",
               {"a": 1, "b": 1}),
    "one word": (["trainset/a/1.jpg", "testset/a/1.jpg"], "train", {"a": 1}),
    "Chinese": (["\u8bad\u7ec3\u96c6/a/1.jpg", "\u9a8c\u8bc1\u96c6/a/1.jpg"], "train", {"a": 1}),
    "a cover": (["d/e/Train/a/1.jpg", "d/e/Test/b/1.jpg"], "train", {"a": 1}),
    "a cover of classes": (["101_Objects/a/1.jpg", "101_Objects/b/1.jpg", "101_Objects/s.jpg"],
                           "train", {"a": 1, "b": 1}),
    "trainval beside train": (["train/a/1.jpg", "trainval/a/1.jpg", "val/a/2.jpg"], "train",
                              {"a": 1}),
    "a stray folder": (["a/abbey/1.jpg", "a/abbey/2.jpg", "a/abbey/x/3.jpg", "b/bar/4.jpg",
                        "c/f/wild/5.jpg", "c/f/park/6.jpg"], "train",
                       {"a/abbey": 3, "b/bar": 1, "c/f/park": 1, "c/f/wild": 1}),
    "strays everywhere": (["a/x/1.jpg", "a/x/2.jpg", "b/z/3.jpg", "b/z/4.jpg", "a/t.jpg",
                           "b/t.jpg", "t.jpg"], "train", {"a/x": 2, "b/z": 2}),
    "a class val": (["val/1.jpg", "key/2.jpg"], "train", {"key": 1, "val": 1}),
    "a class train in a split": (["train/train/1.jpg", "train/bus/2.jpg", "val/train/1.jpg"],
                                 "train", {"bus": 1, "train": 1}),
    "faces": (["with_mask/1.jpg", "without_mask/2.jpg"], "train",
              {"with_mask": 1, "without_mask": 1}),
    "folders of systems": (["a/1.jpg", "b/2.jpg", "__MACOSX/a/3.jpg", "a/@eaDir/1.jpg/S.jpg"],
                           "train", {"a": 1, "b": 1}),
    "a cover in a split": (["train/images/a/1.jpg", "val/images/a/2.jpg"], "val", {"a": 1}),
    "Dutch": (["opleiding/a/1.jpg", "validatie/a/2.jpg"], "train", {"a": 1}),
    "both cases": (["TrAiN/a/1.jpg", "vAl/a/2.jpg"], "val", {"a": 1}),
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
    "no labels of Tiny ImageNet": (
        ["train/n1/images/1.jpg", "train/n2/images/1.jpg", *TINY_VAL],
        "val",
        "no class folders",
    ),
    "corruptions": (
        [f"{g}/{s}/{c}/1.jpg" for g in ("noise/shot", "weather/snow") for s in "12" for c in "ab"],
        "val",
        "end in the same name",
    ),
    "folds in a split": (
        [*(f"train/fold{f}/{c}/1.jpg" for f in "12" for c in "ab"), "val/a/2.jpg"],
        "train",
        "end in the same name",
    ),
    "splits in unknown words": (
        ["latihan/a/1.jpg", "ujian/a/1.jpg", "ujian/b/1.jpg"],
        "train",
        "end in the same name",
    ),
    "other depths": (
        ["train/a/x/1.jpg", "train/b/y/1.jpg", "val/a/1.jpg", "val/b/1.jpg"],
        "val",
        "at another depth than those of train",
    ),
    "several datasets": (
        ["food-101/images/a/1.jpg", "CUB_200_2011/images/a/2.jpg"],
        "train",
        "several datasets",
    ),
    "splits or classes": (["train/a/1.jpg", "holdout/a/1.jpg"], "train", "splits or classes"),
    "unknown words": (
        ["alfa/a/1.jpg", "alfa/b/1.jpg", "beta/a/1.jpg", "beta/b/1.jpg"],
        "train",
        "the same names",
    ),
    "splits below classes": (
        ["nut/train/1.jpg", "nut/test/2.jpg", "bolt/train/1.jpg"],
        "train",
        "look like splits",
    ),
    "masks below classes": (["cat/1.jpg", "cat/masks/1.png", "dog/2.jpg"], "train", "masks"),
    "masks between images": (
        ["cat/1.jpg", "cat/1_mask.png", "dog/2.jpg", "dog/2_mask.png"],
        "train",
        "as masks do",
    ),
    "masks with a number": (
        ["imagesTr/1.png", "labelsTr/1.png", "imagesTs/2.png"],
        "train",
        "masks",
    ),
    "classes of exams": (["train/1.jpg", "test/2.jpg", "exam/3.jpg"], "train", "splits or classes"),
    "copies": (["train/a/1.jpg", "train_256/a/1.jpg", "val/a/2.jpg"], "train", "parts or copies"),
    "two words": (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "val", "may both mean val"),
    "class and split": (
        ["cats_train/1.jpg", "cats_test/1.jpg", "dogs_train/2.jpg"],
        "train",
        "splits or classes",
    ),
    "parts with splits": (
        ["p1/train/a/1.jpg", "p1/val/a/1.jpg", "p2/train/a/1.jpg"],
        "train",
        "look like splits",
    ),
    "lists of splits": (
        ["images/a/1.jpg", "images/b/1.jpg", "train_test_split.txt"],
        "train",
        "--list",
    ),
    "tables of splits": (["images/1.jpg", "train.csv", "test.csv"], "train", "--list"),
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


def test_folders_beside_splits_are_named(tmp_path: Path) -> None:
    src = tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "extra/a/1.jpg", "docs/1.png", "logo.png")
    warnings = "\n".join(find_source(src, "train").warnings)
    assert "2 images in docs, extra are left out" in warnings
    assert "1 images lie in" in warnings


def test_what_changes_labels_is_said(tmp_path: Path) -> None:
    src = tree(tmp_path, *(f"train/{c}/1.jpg" for c in "abc"), "val/b/1.jpg", "val/c/1.jpg")
    (src / "val/a").mkdir()
    warnings = "\n".join(find_source(src, "val").warnings)
    assert "val has 2 classes and train 3 (only one of them has a)" in warnings
    assert "1 folders of" in warnings and "hold no images and are no classes: a" in warnings
    chosen = find_source(src, "val", choice=Choice(classes=["a", "b", "c"]))
    assert chosen.labels.tolist() == [1, 2] and "val has 2" not in "".join(chosen.warnings)
    mixed = tree(tmp_path / "mixed", "a/1.jpg", "a/2.jpg", "b/x/1.jpg")
    source = find_source(mixed, "train")
    assert counts(source) == {"a": 2, "b": 1} and "such as b/x" in source.warnings[0]
    flat = tree(tmp_path / "flat", "train/1.jpg")
    (flat / "train/metadata.csv").write_text("file_name,label\n1.jpg,cat\n")
    source = find_source(flat, "train")
    assert "if train/metadata.csv has labels, give it with --list" in source.warnings[0]
    listed = find_source(flat, "train", choice=Choice(flat / "train/metadata.csv"))
    assert counts(listed) == {"cat": 1}


def test_parts_of_a_split_are_named(tmp_path: Path) -> None:
    source = find_source(tree(tmp_path, *TRAIN_X, "val.X/a/1.jpg", "val.X/b/1.jpg"), "train")
    assert source.warnings == [f"train.X1, train.X2 in {tmp_path} are put together as train"]


def test_names_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    src = tree(tmp_path, "a\nb/1.jpg", "c/2.jpg", os.fsdecode(b"caf\xe9/\xff.jpg"))
    source = find_source(src, "train")
    assert len(source) == 3
    assert source.taken == r"all 3 images as train; 3 classes: a\x0ab, c, caf\xdce9"
    assert len(source.fingerprint()) == 64
    rows = [{"file_name": "c/2.jpg", "label": "\ud800"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    listed = find_source(src, "train", choice=Choice(tmp_path / "list.json"))
    assert counts(listed) == {"\ud800": 1} and len(listed.fingerprint()) == 64


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


def test_birds_aircraft_and_flowers(tmp_path: Path) -> None:
    birds = tree(tmp_path / "b/CUB_200_2011", *(f"images/00{i % 2}.x/{i}.jpg" for i in range(4)))
    tree(tmp_path / "b/segmentations", "000.x/0.png")
    (birds / "images.txt").write_text("".join(f"{i} 00{i % 2}.x/{i}.jpg\n" for i in range(4)))
    (birds / "train_test_split.txt").write_text("0 1\n1 1\n2 1\n3 0\n")
    assert counts(find_source(tmp_path / "b", "train")) == {"000.x": 2, "001.x": 1}
    assert counts(find_source(birds, "val")) == {"001.x": 1}
    planes = tree(tmp_path / "p/fgvc/data", "images/1.jpg", "images/2.jpg").parent
    for split, line in (("train", "1 Cessna 172"), ("val", "2 707-320")):
        (planes / f"data/images_variant_{split}.txt").write_text(f"{line}\n")
    assert counts(find_source(tmp_path / "p", "train")) == {"Cessna 172": 1}
    assert counts(find_source(planes, "val")) == {"707-320": 1}
    flowers = tree(tmp_path / "f", *(f"jpg/image_0000{i}.jpg" for i in range(1, 5)))
    savemat(flowers / "imagelabels.mat", {"labels": [[3, 1, 3, 2]]})
    savemat(flowers / "setid.mat", {"trnid": [[1, 2]], "valid": [[4]], "tstid": [[3]]})
    assert counts(find_source(flowers, "train")) == {"1": 1, "2": 0, "3": 1}
    assert counts(find_source(flowers, "val")) == {"1": 0, "2": 1, "3": 0}


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
    assert listed("id,breed\nn1_1,golden retriever\nn1_2,pug\n") == {
        "golden retriever": 1, "pug": 1}  # fmt: skip
    assert listed(",label,file\n0,cat,n1_1.JPEG\n") == {"cat": 1}
    assert listed("n1_1 Cessna 172\nn1_2 Cessna 208\nn2_1 707-320\n") == {
        "707-320": 1, "Cessna 172": 1, "Cessna 208": 1}  # fmt: skip
    assert listed("n1_1.JPEG 3 1 1\r\nn1_1.JPEG 3 1 1\r\n")["3"] == 1
    for text, message in {
        "other.jpg\n": "none of the 1 images",
        "n2/n1_1.JPEG\n": "none of the 1 images",
        "n1_1.JPEG a\nn1_1.JPEG b\n": "two labels",
        "file,cat,dog\nn1_1.JPEG,1,0\n": "which column is the label",
        "file,label,split\nn1_1.JPEG,a,train\nn1_2.JPEG,b,test\n": "several splits",
    }.items():
        with pytest.raises(UserError, match=message):
            listed(text)
    with pytest.raises(UserError, match="in 1 of 2 lines only"):
        listed("n1_1.JPEG 1\nn2_1.JPEG\n")


INATURALIST = {
    "images": [{"id": 7, "file_name": "t/n1/n1_1.jpg"}, {"id": 8, "file_name": "n2_1.jpg"}],
    "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 8, "category_id": 0}],
    "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "ant"}],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", json.dumps(INATURALIST)),
        ("x.json", '[{"file_name": "n1_1.jpg", "label": "ant"}, {"id": 3, "file_name": "n2_1", '
                   '"label": "cat"}]'),
        ("x.jsonl", '{"path": "n1_1.jpg", "cls": "ant"}\n{"path": "n2_1.jpg", "cls": "cat"}\n'),
        ("x.json", '{"n1/n1_1.jpg": "ant", "n2/n2_1.jpg": "cat"}'),
    ],
)  # fmt: skip
def test_lists_in_json(tmp_path: Path, name: str, text: str) -> None:
    src = tree(tmp_path / "src", "n1/n1_1.jpg", "n1/n1_2.jpg", "n2/n2_1.jpg")
    (tmp_path / name).write_text(text)
    source = find_source(src, "train", choice=Choice(tmp_path / name))
    assert counts(source) == {"ant": 1, "cat": 1}
    assert [source.file_name(i) for i in range(2)] == ["n1_1.jpg", "n2_1.jpg"]
    for spoilt in (text[:-9], '[{"a": 1}]', "[1]", "[]"):
        (tmp_path / name).write_text(spoilt)
        with pytest.raises(UserError, match=name):
            find_source(src, "train", choice=Choice(tmp_path / name))


def test_paths_of_a_list_are_those_of_the_source(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", "train/a/1.jpg", "val/a/1.jpg", "train/cafe\u0301/2.jpg")
    (tmp_path / "list").write_text("/data/train/a/1.jpg\ncaf\u00e9/2.jpg\na/1.jpg\n")
    source = find_source(src, "train", choice=Choice(tmp_path / "list"))
    assert counts(source) == {"a": 1, "caf\u00e9": 1}
    assert "1 images of" in source.warnings[0] and "not unique" in source.warnings[0]


def test_lists_of_classes(tmp_path: Path) -> None:
    for text, names in {
        "golden retriever\nlabrador retriever\n": ["golden retriever", "labrador retriever"],
        "n01440764 tench, Tinca\nn01443537 goldfish\n": ["n01440764", "n01443537"],
        "/a/airfield 1\n/a/abbey 0\n": ["a/abbey", "a/airfield"],
        "cat,feline\ndog,canine\n": ["cat", "dog"],
        "caf\u0065\u0301\n": ["caf\u00e9"],
    }.items():
        (tmp_path / "classes.txt").write_text(text)
        assert read_classes(tmp_path / "classes.txt") == names


def test_classes_depth_and_a_share(tmp_path: Path) -> None:
    src = tree(tmp_path, *(f"{c}/{d}/{k}.jpg" for c in "ab" for d in "xy" for k in range(10)))
    some = find_source(src, "train", choice=Choice(classes=["b/y", "a/x", "none"], class_depth=2))
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
    with pytest.raises(UserError, match="no image lies 3 folders deep"):
        find_source(src, "train", choice=Choice(class_depth=3))


def test_splits_stay_splits(tmp_path: Path) -> None:
    """`--class-depth` counts below the folders of splits, and `--val-share` is refused where they
    are."""
    folds = [f"{s}/{g}/{c}/{s}.jpg" for s in ("train", "val") for g in "xy" for c in "ab"]
    src = tree(tmp_path, *folds)
    for depth, expected in (
        (1, {"x": 2, "y": 2}),
        (2, {f"{g}/{c}": 1 for g in "xy" for c in "ab"}),
    ):
        source = find_source(src, "val", choice=Choice(class_depth=depth))
        assert counts(source) == expected and source.file_name(0) == "val.jpg"
    flat = tree(tmp_path / "flat", "train/a/1.jpg", "train/b/2.jpg", "val/1.jpg")
    assert counts(find_source(flat, "train", choice=Choice(class_depth=1))) == {"a": 1, "b": 1}
    with pytest.raises(UserError, match="val has no class folders"):
        find_source(flat, "val", choice=Choice(class_depth=1))
    with pytest.raises(UserError, match="has splits of its own"):
        find_source(src, "train", choice=Choice(val_share=0.5))
    (tmp_path / "list").write_text("train/x/a/train.jpg\n")
    listed = find_source(src, "train", choice=Choice(tmp_path / "list", class_depth=1))
    assert counts(listed) == {"x": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("GalaxyID,Class1.1,Class1.2\n{}.jpg,0.38,0.61\n", "no image and no known header"),
        ("Image Index,Finding Labels\n{}.jpg,A\n", "no image and no known header"),
        ("image,label\n{}.jpg,0.25\n", r"numbers such as 0\.25"),
        ("1.jpg train\n2.jpg val\n", "names of splits"),
        ("image,label\n1.jpg,A|B\n2.jpg,A\n", "several labels"),
    ],
)
def test_lists_whose_columns_hold_something_else(tmp_path: Path, rows: str, says: str) -> None:
    tree(tmp_path / "src", "1.jpg", "2.jpg")
    (tmp_path / "list.csv").write_text(rows.format(1))
    with pytest.raises(UserError, match=says):
        find_source(tmp_path / "src", "train", choice=Choice(tmp_path / "list.csv"))


def test_images_of_other_classes_are_counted_and_links_to_themselves_left_out(
    tmp_path: Path,
) -> None:
    tree(tmp_path, "cat/1.jpg", "emu /2.jpg", "emu /3.jpg", "fox/4.jpg")
    for name in ("self", "cat/self", "cat/self.jpg"):
        (tmp_path / name).symlink_to(Path(name).name)
    (tmp_path / "back").symlink_to(tmp_path)
    source = find_source(tmp_path, "train", choice=Choice(classes=["Cat", "emu", "fox"]))
    assert counts(source) == {"Cat": 0, "emu": 2, "fox": 1}
    assert any("1 of 4 images are left out" in line and "cat" in line for line in source.warnings)


@pytest.mark.parametrize("shape", [(2000, 8, 8), (5, 8, 8, 3), (7,)])
def test_arrays_of_many_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for name in ("train_images.npy", "val_images.npy"):
        np.save(tmp_path / name, np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="not one image; write each image of it as a file"):
        find_source(tmp_path, "train", choice=Choice(class_depth=1))
    with pytest.raises(UserError, match="not one image"):
        find_source(tmp_path, "train")
