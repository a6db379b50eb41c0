"""Indexing foreign tars loses nothing silently and replaces no files of others."""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from make_disks import full_disk, read_only_disk
from make_trees import jpg, tree

from mae_scale.cli import main
from mae_scale.data.cache import ShardCache
from mae_scale.data.loader import TrainLoader
from mae_scale.data.shards import NO_LABEL, open_shards
from mae_scale.errors import RunError, UserError
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.labels import label_text
from mae_scale.sharding.verify import verify


def write(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(n: int = 40) -> list[tuple[str, bytes]]:
    return [f for i in range(n) for f in ((f"{i:03d}.jpg", jpg(i)), (f"{i:03d}.cls", b"%d" % i))]


def labels(folder: Path) -> list[int]:
    return open_shards(folder).index["label"].tolist()


# Archives that are not whole


def test_a_damaged_header_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", samples())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[20].offset
    data = bytearray(path.read_bytes())
    data[at + 150] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged header at byte {at:,}"):
        index_shards([str(path)])
    assert not (tmp_path / "manifest.json").exists()


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", samples())
    one = path.read_bytes()
    path.write_bytes(one + one)
    with pytest.raises(UserError, match=f"goes on at byte {len(one):,}"):
        index_shards([str(path)])


@pytest.mark.parametrize("remote", [False, True])
def test_a_tar_that_is_cut_between_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], remote: bool
) -> None:
    path = write(tmp_path / "x.tar", samples())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[40].offset
    path.write_bytes(path.read_bytes()[:at])
    spec = f"pipe:cat {path}" if remote else str(path)
    report = index_shards([spec], tmp_path / "index" if remote else None)
    assert report.samples == 20
    assert f"no end marker behind byte {at:,}" in capsys.readouterr().err
    if not remote:
        assert "x.tar: has no end marker: it may be cut" in verify(tmp_path).problems


def test_verify_sees_what_was_joined_later(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", samples(4))
    index_shards([str(path)])
    assert verify(tmp_path).problems == []
    path.write_bytes(path.read_bytes() * 2)
    assert any("goes on at byte" in problem for problem in verify(tmp_path).problems)


# Samples


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["v.1.jpg", "v.1.cls", "v.2.jpg", "v.2.cls"], [0, 1]),
        (["a.final.jpg", "a.final.cls", "a.draft.jpg", "a.draft.cls"], [0, 1]),
        (["a.input.jpg", "a.cls", "b.input.png", "b.cls"], [0, 1]),
        (["a.jpg", "a.seg.png", "a.cls", "b.bmp", "b.cls"], [0, 1]),
        (["a.GIF", "a.cls", "b.jfif", "b.cls"], [0, 1]),
        (["._a.jpg", "a.jpg", "a.cls", ".DS_Store"], [0]),
    ],
)
def test_keys_and_suffixes(tmp_path: Path, names: list[str], expected: list[int]) -> None:
    number, files = 0, []
    for name in names:
        files.append((name, b"%d" % number if name.endswith("cls") else jpg(number)))
        number += name.endswith("cls")
    write(tmp_path / "x.tar", files)
    index_shards([str(tmp_path)])
    assert labels(tmp_path) == expected
    assert verify(tmp_path).problems == []


def test_several_images_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [(f"{k}.{p}.jpg", jpg(i)) for k in "ab" for i, p in enumerate(("input", "target"))]
    write(tmp_path / "x.tar", [*both, ("c.jpg", jpg(3)), ("d.txt", b"x"), ("e.jpg", b"")])
    report = index_shards([str(tmp_path)])
    assert report.samples == 1 and report.left_out == 4
    err = capsys.readouterr().err
    for words in (
        "2 left out: the samples have several images, input.jpg, target.jpg",
        "(such as a)",
        "no image, only .txt (such as d)",
        "empty (such as e.jpg)",
    ):
        assert words in err
    assert index_shards([str(tmp_path)], image_key="target.jpg").samples == 2
    offset = int(open_shards(tmp_path).index["offset"][0])
    assert (tmp_path / "x.tar").read_bytes()[offset:].startswith(jpg(1))


def test_files_of_one_key_twice_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("a.jpg", jpg(0)), ("a.cls", b"1"), ("a.jpg", jpg(1)), ("a.png", jpg(2)),
             ("b.jpg", jpg(3)), ("b.cls", b"2"), ("b.cls", b"02"),
             ("c.jpg", jpg(4)), ("c.cls", b"0"), ("c.cls", b"1"),
             ("d.cls", b"0"), ("d.cls", b"1")]  # fmt: skip
    write(tmp_path / "x.tar", files)
    report = index_shards([str(tmp_path)])
    assert labels(tmp_path) == [1, 2] and report.left_out == 4
    said = capsys.readouterr().err
    assert "2 left out: another image of its key counts (such as a.jpg)" in said
    assert "2 left out: its labels contradict each other (such as c.jpg)" in said
    assert verify(tmp_path).problems == []


def test_labels_behind_all_images(tmp_path: Path) -> None:
    files = [(f"{i}.jpg", jpg(i)) for i in range(4)] + [(f"{i}.cls", b"%d" % i) for i in range(5)]
    write(tmp_path / "x.tar", files)
    report = index_shards([str(tmp_path)])
    assert labels(tmp_path) == [0, 1, 2, 3]
    assert report.left_out == 1 and report.unlabelled == 0
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize("content", [b"[0,1,0]", b"\x93NUMPY", "cat".encode("utf-16"), b"{}"])
def test_labels_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "x.tar", [("a.jpg", jpg(0)), ("a.cls", content)])
    with pytest.raises(UserError, match=r"x\.tar: a\.cls is"):
        index_shards([str(tmp_path)])


def test_no_image_at_all_says_why(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", [(f"a.{part}.jpg", jpg(0)) for part in ("in", "out")])
    with pytest.raises(UserError, match=r"several images, in\.jpg, out\.jpg"):
        index_shards([str(tmp_path)])


def test_sparse_files_and_links_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x.tar", samples(2))
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "000.jpg"
        tar.addfile(link)
    assert index_shards([str(tmp_path)]).samples == 2
    assert "1 left out: it is a link (such as 9.jpg)" in capsys.readouterr().err


def test_an_image_of_too_many_pixels_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x.tar", samples(2))
    with pytest.raises(UserError, match="no images"):
        index_shards([str(tmp_path)], max_pixels=1000)
    write(
        tmp_path / "x.tar", [*samples(2), ("z.png", jpg(0).replace(b"\0 \0 ", b"\xff\xff\xff\xff"))]
    )
    assert index_shards([str(tmp_path)]).samples == 2
    assert "more than 178,956,970 pixels (such as z.png)" in capsys.readouterr().err


# Labels


@pytest.mark.parametrize(
    ("value", "text"),
    [("007", "7"), ("3.0", "3"), (3.0, "3"), ("-1", None), (-1, None), ("", None),
     (" cat\n", "cat"), ("1e400", "1e400"), ("nan", "nan"), ("1_000", "1_000"), (True, None),
     ("٣", "3"), ("Cafe\u0301", "Caf\u00e9")],
)  # fmt: skip
def test_labels_in_their_plain_form(value: object, text: str | None) -> None:
    assert label_text(value) == text


def test_labels_of_all_kinds(tmp_path: Path) -> None:
    texts = [b"007", b"3.0", b"-1", b"0"]
    write(tmp_path / "x.tar", [
        f for i, text in enumerate(texts) for f in ((f"{i}.jpg", jpg(i)), (f"{i}.cls", text))
    ])  # fmt: skip
    index_shards([str(tmp_path)])
    assert labels(tmp_path) == [7, 3, NO_LABEL, 0]
    assert len(open_shards(tmp_path).classes) == 8
    assert verify(tmp_path).problems == []


def test_a_label_of_billions_is_a_name(tmp_path: Path) -> None:
    files = [(f"{i}.jpg", jpg(i)) for i in range(2)]
    big = [("0.json", b'{"label": 3000000000}'), ("1.json", b'{"label": 17}')]
    write(tmp_path / "x.tar", sorted([*files, *big]))
    index_shards([str(tmp_path)])
    assert labels(tmp_path) == [1, 0]
    assert open_shards(tmp_path).classes == ["17", "3000000000"]


def test_a_label_key_that_no_sample_has(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", [("0.jpg", jpg(0)), ("0.json", b'{"category": 3, "url": "x"}')])
    with pytest.raises(UserError, match=r"under the key species .*: category, url"):
        index_shards([str(tmp_path)], label_key="species")


def test_classes_of_another_split(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", [("0.jpg", jpg(0)), ("0.cls", b"dog")])
    index_shards([str(tmp_path)], classes=["ant", "cat", "dog"])
    assert labels(tmp_path) == [2] and len(open_shards(tmp_path).classes) == 3
    with pytest.raises(UserError, match="1 of 1 labels are not among the 1 classes: dog"):
        index_shards([str(tmp_path)], classes=["ant"])


# Where the index goes


def test_links_are_not_followed(tmp_path: Path) -> None:
    """In Hugging Face's cache names are links into a folder of contents that all splits share."""
    for split in ("train", "val"):
        blob = write(tmp_path / "blobs" / split, samples(3))
        (tmp_path / "snapshots" / split).mkdir(parents=True)
        (tmp_path / "snapshots" / split / "0.tar").symlink_to(os.path.relpath(
            blob, tmp_path / "snapshots" / split))  # fmt: skip
        index_shards([str(tmp_path / "snapshots" / split)], split=split)
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == ["train", "val"]
    for split in ("train", "val"):
        assert open_shards(tmp_path / "snapshots" / split).split == split


def test_an_index_replaces_only_its_own(tmp_path: Path) -> None:
    write(tmp_path / "tr.tar", samples(3))
    write(tmp_path / "va.tar", samples(2))
    theirs = b'{"splits": {"theirs": 1}}'
    (tmp_path / "_info.json").write_bytes(theirs)
    index_shards([str(tmp_path / "tr.tar")])
    both = [str(tmp_path / "va.tar"), str(tmp_path / "tr.tar")]
    before = (tmp_path / "manifest.json").read_bytes()
    for split in ("train", "val"):
        with pytest.raises(UserError, match="has the index of the split train, of 1 tars, already"):
            index_shards([str(tmp_path / "va.tar")], split=split)
    assert (tmp_path / "manifest.json").read_bytes() == before
    index_shards(both, pattern="*")  # more of the same split
    assert (tmp_path / "_info.json").read_bytes() == theirs
    assert "va.tar" in json.loads((tmp_path / "sizes.json").read_bytes())


def test_an_index_of_others_stays(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", samples(3))
    np.save(tmp_path / "index.npy", np.arange(5))
    with pytest.raises(UserError, match=r"index\.npy of something else"):
        index_shards([str(tmp_path)])


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    write(tmp_path / "tars" / "x.tar", samples())
    with full_disk(tmp_path / "disk") as disk:
        with pytest.raises(RunError, match=r"no room in .* for the index"):
            index_shards([str(tmp_path / "tars")], disk / "index")
        assert not any((disk / "index").iterdir())


def test_a_disk_that_is_read_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tars" / "x.tar", samples(3))
    tree(tmp_path / "images", "a/1.jpg", "b/2.jpg")
    with read_only_disk(tmp_path / "disk") as disk:
        for out in (disk, disk / "index"):
            assert main(["index", str(tmp_path / "tars"), "--out", str(out)]) == 2
            assert main(["shard", str(tmp_path / "images"), str(out), "--split", "train"]) == 2
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 2 and all("cannot be written" in line for line in said), said
            with pytest.raises(UserError, match=r"cannot be written.*cache_dir"):
                ShardCache(out)


def test_hidden_tars_and_unknown_schemes(tmp_path: Path) -> None:
    write(tmp_path / "000.tar", samples(3))
    (tmp_path / "._000.tar").write_bytes(b"Mac OS X")
    assert index_shards([str(tmp_path)]).shards == 1
    with pytest.raises(UserError, match="unknown scheme"):
        index_shards(["wss://host/{000..003}.tar"], tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (
            ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"],
            ["imagenet1k-validation-00.tar"],
        ),
        (["train-shard-0.tar", "train-shard-1.tar"], ["val-shard-0.tar"]),
        (["train-00-of-64.tar", "train-1-of-64.tar"], ["val-00-of-64.tar"]),
        (["x-0.tar", "x-1.tar"], ["x-0-val.tar"]),
        (["train/0.tar", "train/1.tar"], ["val/0.tar"]),
        (["train[1].tar"], ["dev[1].tar"]),
    ],
)
def test_families_of_names_are_refused_with_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: list[str], val: list[str]
) -> None:
    for name in train + val:
        write(tmp_path / name, samples(3 if name in train else 2))
    flat = "/" not in train[0]
    typed = [str(tmp_path)] if flat else [str(tmp_path / name) for name in train + val]
    for options in ([], ["--split", "train"]):
        assert main(["index", *typed, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("manifest.json"))
    offers = error.split(f"mae-scale index {tmp_path}")[-1].partition(";")[0] if flat else error
    offers = "--pattern" + offers.partition("--pattern")[2].partition(";")[0]
    counts = []
    for number, offer in enumerate(shlex.split(o) for o in offers.split(" | ")):
        if "--out" not in offer:
            offer += ["--out", str(tmp_path / f"out{number}")]
        assert main(["index", *typed, *offer]) == 0
        shards = open_shards(offer[offer.index("--out") + 1])
        split = offer[offer.index("--split") + 1] if "--split" in offer else "train"
        assert shards.split == split
        counts.append(len(shards))
    assert sorted(counts) == [2 * len(val), 3 * len(train)]
    assert main(["index", *typed, "--pattern", "*", "--out", str(tmp_path / "all")]) == 0
    assert len(open_shards(tmp_path / "all")) == sum(counts)
    assert main(["index", *typed, "--pattern", "y-*"]) == 2


@pytest.mark.parametrize(
    "names",
    [
        ["x-8.tar", "x-09.tar", "x-100.tar"],
        ["0a1f93bc.tar", "deadbeef.tar", "12345678.tar"],
        [
            "p-3f2b6f9e-1c2d-4abc-9def-0123456789ab.tar",
            "p-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee.tar",
        ],
        ["train-000000.tar", "train-000001.tar"],
    ],
)
def test_numbers_and_hashes_are_one_family(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, samples(2))
    assert index_shards([str(tmp_path)]).shards == len(names)


def test_the_end_shows_what_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [*samples(4), ("4.jpg", jpg(4)), ("4.cls", b"3"), ("5.txt", b"?")]
    write(tmp_path / "tars" / "0.tar", files)
    tree(tmp_path / "src", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    assert main(["index", str(tmp_path / "tars")]) == 0
    said = capsys.readouterr()
    both = said.out + said.err
    lines = [
        "images     5",
        "smallest class 0, 0 (1 images); largest class 3, 3 (2 images)",
        "1: there is no image, only .txt",
        "000.jpg: class 0",
        "4.jpg: class 3",
    ]
    for line in lines:
        assert line in both, both
    out = tmp_path / "out"
    command = ["shard", str(tmp_path / "src"), str(out), "--split", "train"]
    assert main(command) == 0
    drawn = (out / "preview.png").read_bytes()
    said = capsys.readouterr()
    assert "largest class 0, cat (2 images)" in said.out + said.err
    assert main(command) == 0 and (out / "preview.png").read_bytes() == drawn
    assert "sample" not in capsys.readouterr().out
    for folder in (out, tmp_path / "tars"):
        assert (folder / "preview.png").exists() and main(["verify", str(folder)]) == 0
    write(tmp_path / "tars" / "1.tar", samples(2))
    before = (tmp_path / "tars" / "preview.png").read_bytes()
    assert main(["index", str(tmp_path / "tars")]) == 0
    assert (tmp_path / "tars" / "preview.png").read_bytes() != before
    (tmp_path / "tars" / "preview.png").write_bytes(jpg(0))  # a picture of somebody else
    assert main(["index", str(tmp_path / "tars")]) == 0
    assert (tmp_path / "tars" / "preview.png").read_bytes() == jpg(0)


# Secrets


def test_secrets_are_not_written_down(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / "tars" / f"{i:03d}.tar", samples(3))
    command = f"pipe:TOKEN=SECRET sh -c 'cat {tmp_path}/tars/{{000..001}}.tar' SECRET"
    report = index_shards([command], tmp_path / "index")
    for path in (tmp_path / "index").iterdir():
        assert b"SECRET" not in path.read_bytes()
    assert report.reads_with and "SECRET" not in report.reads_with
    given = f"{tmp_path}/index+" + command.replace("{000..001}.tar", "{}")
    assert open_shards(given).files == [command.replace("{000..001}", f"{i:03d}") for i in range(2)]
    with pytest.raises(UserError, match="cannot be read") as caught:
        index_shards([f"pipe:false SECRET {tmp_path}/{{000..001}}.tar"], tmp_path / "other")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("lanes", "warns"), [(2, True), (64, False)])
def test_tars_that_are_sorted_by_class_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lanes: int, warns: bool
) -> None:
    """With twenty classes in four tars, a batch of 32 from two lanes would hold few classes."""
    image = jpg(0)
    for tar in range(4):
        files = [
            f for i in range(100)
            for f in ((f"{i:03d}.jpg", image), (f"{i:03d}.cls", b"%d" % (tar * 5 + i // 20)))
        ]  # fmt: skip
        write(tmp_path / f"{tar}.tar", files)
    index_shards([str(tmp_path)])
    TrainLoader(open_shards(tmp_path), img_size=32, global_batch_size=32, lanes=lanes, window=20)
    messages = [record.message for record in caplog.records]
    assert bool(messages) == warns
    if warns:
        assert "is sorted by class, and 2 lanes" in messages[0]
        assert "set lanes to" in messages[0]
