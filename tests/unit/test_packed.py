"""Images in tars and in parquet files: each form is understood, or refused in one line."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from make_disks import full_disk
from make_trees import counts, jpg, tree, write_tar

from mae_scale.cli import main
from mae_scale.errors import UserError
from mae_scale.sharding.listing import Source
from mae_scale.sharding.sources import Choice, find_source


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


@pytest.mark.parametrize("ending", ["tar", "tgz", "tar.bz2", "tar.xz"])
def test_tars_of_splits_and_of_everything(tmp_path: Path, ending: str) -> None:
    mode = {"tar": "w", "tgz": "w:gz"}.get(ending, f"w:{ending[4:]}")
    inside = [f"{c}/{k}.jpg" for c in "ab" for k in "12"]
    for number, prefix in enumerate(("", "./", "data/")):
        src = tmp_path / str(number)
        for split in ("train", "val"):
            write_tar(src / f"{split}.{ending}", [f"{prefix}{split}/{n}" for n in inside], mode)
        assert counts(find_source(src, "val", work=tmp_path / "w")) == {"a": 2, "b": 2}
    names = [f"nette/{s}/{n}" for s in ("train", "val") for n in inside]
    write_tar(tmp_path / "nette" / f"nette.{ending}", names, mode)
    source = find_source(tmp_path / "nette", "val", work=tmp_path / "w")
    assert counts(source) == {"a": 2, "b": 2}
    assert source.read(0) == jpg(4)
    (tmp_path / "list").write_text("val/b/2.jpg\n")
    chosen = find_source(
        tmp_path / "nette", "val", choice=Choice(tmp_path / "list"), work=tmp_path / "w"
    )
    assert counts(chosen) == {"b": 1} and chosen.read(0) == jpg(7)


def test_names_of_tars_that_say_more_than_a_split(tmp_path: Path) -> None:
    places = tmp_path / "places"
    write_tar(places / "train_256_places365standard.tar", ["d/a/abbey/1.jpg", "d/b/bar/2.jpg"])
    assert len(find_source(places, "train")) == 2
    with pytest.raises(UserError, match="no val split; it has: train"):
        find_source(places, "val")
    write_tar(places / "val_256.tar", ["val_256/x/1.jpg", "val_256/y/2.jpg"])
    assert counts(find_source(places, "train")) == {"a/abbey": 1, "b/bar": 1}
    assert counts(find_source(places, "val")) == {"x": 1, "y": 1}
    for number, names in enumerate((["cars_train", "cars_test"], ["train", "train_aug", "val"])):
        for name in names:
            write_tar(tmp_path / str(number) / f"{name}.tar", ["a/1.jpg", "b/2.jpg"])
        with pytest.raises(UserError, match="splits, or parts or copies of one"):
            find_source(tmp_path / str(number), "train")
    for name in ("bullet_train", "freight_train"):
        write_tar(tmp_path / "classes" / f"{name}.tar", ["1.jpg"])
    assert counts(find_source(tmp_path / "classes", "train")) == {
        "bullet_train": 1, "freight_train": 1}  # fmt: skip


def test_tars_of_classes_below_a_cover_and_beside_images(tmp_path: Path) -> None:
    for wnid in ("n1", "n2"):
        write_tar(tmp_path / f"a/winter21_whole/{wnid}.tar.gz", [f"{wnid}/1.JPEG"], "w:gz")
        write_tar(tmp_path / f"b/ILSVRC2012_img_train/{wnid}.tar", [f"{wnid}_1.JPEG"])
    tree(tmp_path / "b/val", "n1/2.JPEG")
    work = tmp_path / "work"
    assert counts(find_source(tmp_path / "a", "train", work=work)) == {"n1": 1, "n2": 1}
    assert counts(find_source(tmp_path / "b", "train")) == {"n1": 1, "n2": 1}
    assert counts(find_source(tmp_path / "b", "val")) == {"n1": 1}
    tree(tmp_path / "b/ILSVRC2012_img_test", "1.JPEG")
    (tmp_path / "b/x.zip").write_bytes(b"PK")
    assert "not read: x.zip" in "".join(find_source(tmp_path / "b", "val").warnings)


def test_tars_that_are_not_clear(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / "numbers" / f"00{i}.tar", ["1.jpg"])
    with pytest.raises(UserError, match="classes or parts"):
        find_source(tmp_path / "numbers", "train")
    numbers = find_source(tmp_path / "numbers", "train", choice=Choice(class_depth=1))
    assert counts(numbers) == {"000": 1, "001": 1}
    write_tar(tmp_path / "cut" / "cat.tar", ["1.jpg", "2.jpg"])
    write_tar(tmp_path / "cut" / "dog.tar", ["1.jpg", "2.jpg"])
    cut = tmp_path / "cut" / "dog.tar"
    with tarfile.open(cut) as tar:
        border = tar.getmembers()[1].offset
    cut.write_bytes(cut.read_bytes()[:border])
    source = find_source(tmp_path / "cut", "train")
    assert counts(source) == {"cat": 2, "dog": 1}
    assert any("dog.tar has no end marker" in line for line in source.warnings)
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip/train.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"unpack train\.zip first"):
        find_source(tmp_path / "zip", "train")


def test_lists_of_splits_in_a_tar_are_seen(tmp_path: Path) -> None:
    names = [f"food/images/{c}/{k}.jpg" for c in "ab" for k in "12"]
    for mode, name in (("w", "food.tar"), ("w:gz", "food.tar.gz")):
        src = tmp_path / name
        write_tar(src / name, [*names, "food/meta/train.txt", "food/meta/test.txt"], mode)
        with pytest.raises(UserError, match=r"look like lists of splits.*--list"):
            find_source(src, "train", work=tmp_path / "work")
        (tmp_path / "list").write_text("a/1\nb/2\n")
        choice = Choice(tmp_path / "list")
        assert counts(find_source(src, "train", choice=choice, work=tmp_path / "work")) == {
            "a": 1, "b": 1}  # fmt: skip


def test_a_damaged_compressed_tar(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_tar(tmp_path / "x.tar", [f"{c}/{k}.jpg" for c in "abcd" for k in "12"])
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        header = tar.getmembers()[5].offset
    spoilt = bytearray(whole)
    spoilt[header + 150] ^= 255
    src.mkdir()
    for data in (gzip.compress(bytes(spoilt)), gzip.compress(whole)[:-100], b"\x1f\x8bnothing"):
        (src / "train.tar.gz").write_bytes(data)
        with pytest.raises(UserError) as caught:
            find_source(src, "train", work=tmp_path / "work")
        assert "train.tar.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_packed_source_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_tar(src / "train.tgz", [f"{c}/{k}.jpg" for c in "ab" for k in range(400)], "w:gz")
    assert main(["shard", str(src), str(tmp_path / "bad"), "--split", "val"]) == 2
    with full_disk(tmp_path / "disk") as disk:
        assert main(["shard", str(src), str(disk / "out"), "--split", "train"]) == 1
        assert not (disk / "out").exists()
    assert not (tmp_path / "bad").exists()


def test_links_in_a_tar_of_a_class_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["1.jpg"])
    write_tar(tmp_path / "b.tar", ["1.jpg"])
    with tarfile.open(tmp_path / "b.tar", "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    assert "it is a link" in "".join(find_source(tmp_path, "train").warnings)


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


def test_labels_of_parquet_that_are_names_of_the_metadata(tmp_path: Path) -> None:
    """Names may be written in another Unicode form; a label that no name fits gets a line."""
    import pyarrow
    from pyarrow import parquet

    composed, decomposed = "caf\u00e9", "cafe\u0301"
    facts = json.dumps({"info": {"features": {"label": {"names": ["tea", decomposed]}}}})

    def source_of(labels: list[str]) -> Source:
        columns = {"image": [jpg(i) for i in range(len(labels))], "label": labels}
        table = pyarrow.table(columns).replace_schema_metadata({"huggingface": facts})
        parquet.write_table(table, tmp_path / "train.parquet")
        return find_source(tmp_path, "train", work=tmp_path / "work")

    assert counts(source_of([composed, decomposed, "tea", "1"])) == {"tea": 1, composed: 3}
    for label in ("cocoa", "2", "\x1b[2J"):
        with pytest.raises(UserError, match=r"row 1 of .*list 2 classes: tea, caf"):
            source_of(["tea", label])


def test_parquet_as_others_write_it(tmp_path: Path) -> None:
    """Columns of bytes, dictionaries, nulls, lists, partitions, and names without a split are
    read."""
    import pyarrow
    from pyarrow import parquet

    images = [jpg(i) for i in range(6)]
    letters = pyarrow.array(list("abcabc")).dictionary_encode()
    tables: dict[str, tuple[dict, dict[str, int]]] = {
        "train.parquet": ({"img": images, "fine_label": [0, 1] * 3}, {"0": 3, "1": 3}),
        "train/part.0.parquet": ({"image": images, "label": letters}, {"a": 2, "b": 2, "c": 2}),
        "default/train/0000.parquet": (
            {"image": [*images[:5], None], "label": [0, 1, None, 0, 1, 1]}, {"0": 2, "1": 2}),
        "train-0.parquet": (
            {"image": [list(image) for image in images], "label": [[1]] * 6}, {"0": 0, "1": 6}),
        "train/label=cat/0.parquet": ({"image": images}, {"cat": 6}),
        "train_0.parquet": (
            {"foto": images, "Label": [i > 3 for i in range(6)], "id": list(range(6))},
            {"0": 4, "1": 2}),
        "train/x.parquet": (
            {"image": images, "label": [None, -1] * 3, "url": ["x"] * 6}, {"images": 6}),
        "part-0.parquet": ({"image": images, "label": [2.0] * 6}, {"0": 0, "1": 0, "2": 6}),
    }  # fmt: skip
    for number, (name, (columns, expected)) in enumerate(tables.items()):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
        source = find_source(tmp_path / str(number), "train", work=tmp_path / "work")
        assert counts(source) == expected, name
        assert ("all 6 images as train" in source.taken) == name.startswith("part")
        if "0000" in name:
            said = "\n".join(source.warnings)
            assert "1 rows" in said and "no bytes" in said and "no label" in said
    for column in (["/1.jpg"] * 6, [{"bytes": None, "path": "1.jpg"}] * 6):
        parquet.write_table(pyarrow.table({"image": column}), tmp_path / "0/train.parquet")
        with pytest.raises(UserError, match=r"row 0 of .*train\.parquet has"):
            find_source(tmp_path / "0", "train", work=tmp_path / "work")


def test_parquet_files_with_several_candidates_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def write(path: Path, columns: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {n: [jpg(0), jpg(1)] if k == "Image" else [0, 1] for n, k in columns.items()}
        kinds = {n: {"_type": k, "names": ["a", "b"]} for n, k in columns.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": kinds}})}
        table = pyarrow.table(values).replace_schema_metadata(metadata)
        parquet.write_table(table, path)

    write(tmp_path / "images" / "0.parquet", {"mask": "Image", "image": "Image", "label": "Value"})
    write(tmp_path / "labels" / "0.parquet",
          {"image": "Image", "genus": "ClassLabel", "species": "ClassLabel"})  # fmt: skip
    write(tmp_path / "some" / "0.parquet", {"image": "Image", "label": "ClassLabel"})
    write(tmp_path / "some" / "1.parquet", {"image": "Image"})
    for name in ("data", "tiny"):
        write(tmp_path / "hub" / name / "train-00000-of-00001.parquet", {"image": "Image"})
    for folder, says in (("images", "columns of images"), ("hub", "data or .*tiny"),
                         ("labels", "columns of labels"),
                         ("some", "others have none")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            find_source(tmp_path / folder, "train", work=tmp_path / "w")
