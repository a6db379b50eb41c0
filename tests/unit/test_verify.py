"""Verifying shards, and indexing foreign tars."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mae_scale.data.shards import NO_LABEL, ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.plan import Options
from mae_scale.sharding.run import shard
from mae_scale.sharding.verify import verify

SCRIPTS = Path(__file__).parents[2] / "data_prep"


def script(name: str, *args: object) -> tuple[int, str, str]:
    main = runpy.run_path(str(SCRIPTS / name))["main"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([*map(str, args)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def intact(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("intact") / "train"
    assert shard(imagenet_tree, out, Options("train", samples_per_shard=60), workers=2) == 0
    return out


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "train")
    return tmp_path / "train"


def spoil(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_intact_shards(intact: Path, fast: list[str]) -> None:
    code, out, err = script("verify_shards.py", intact, "--workers", 2, *fast)
    assert (code, err) == (0, "")
    assert "250 images" in out and "250 classes" in out and "5 shards" in out


@pytest.mark.parametrize("fast", [True, False])
def test_each_damaged_member_is_named_and_no_other(folder: Path, fast: bool) -> None:
    tar = folder / "train-000001.tar"
    files = members(tar)
    bad = [files[0], files[20], files[48], files[80], files[101]]
    spoil(tar, bad[0].offset_data + bad[0].size // 2, b"\x12\x34")  # image
    spoil(tar, bad[1].offset_data, b"spoilt")  # image, its beginning
    spoil(tar, bad[2].offset, b"\xff\xff")  # header of an image
    spoil(tar, bad[3].offset_data + 100, bytes(200))  # image
    spoil(tar, bad[4].offset_data, b"7777")  # label
    problems = verify(folder, fast=fast, workers=2).problems
    assert problems[0] == "train-000001.tar: has another SHA-256 than the manifest says"
    named = {p.split()[1] for p in problems if ".jpg" in p}
    assert len(files) == 120
    expected = {bad[0].name, bad[1].name, bad[3].name, bad[4].name.replace(".cls", ".jpg")}
    assert named - expected <= {p.split()[1] for p in problems if "header" in p}
    assert expected <= named
    assert len([p for p in problems if "header" in p]) == 1
    assert all(p.startswith("train-000001.tar: ") for p in problems)
    code, out, err = script("verify_shards.py", folder, *(["--fast"] if fast else []))
    assert code == 1 and out == ""
    assert len(err.splitlines()) == len(problems) + 1


def test_shards_that_are_cut_missing_or_swapped(folder: Path) -> None:
    cut = folder / "train-000000.tar"
    files = members(cut)
    end = files[100].offset_data + files[100].size // 2
    spoil(cut, 0, b"")
    with cut.open("r+b") as stream:
        stream.truncate(end)
    (folder / "train-000002.tar").unlink()
    shutil.copy(folder / "train-000003.tar", folder / "train-000001.tar")
    problems = verify(folder, workers=2).problems
    assert "train-000002.tar: is missing" in problems
    assert sum("is cut short" in p for p in problems if p.startswith("train-000000")) >= 10
    assert not any(files[0].name in p for p in problems)
    assert any(p.startswith("train-000001.tar: has another SHA-256") for p in problems)
    assert not any(p.startswith(("train-000003", "train-000004")) for p in problems)


def test_an_image_that_cannot_be_decoded_is_found_though_its_bytes_are_as_written(
    tmp_path: Path,
) -> None:
    with webdataset.TarWriter(str(tmp_path / "x-000.tar")) as writer:
        writer.write({"__key__": "one", "jpg": b"\xff\xd8 no image", "cls": b"0"})
    index_shards([str(tmp_path)])
    assert verify(tmp_path, fast=True).problems == []
    (problem,) = verify(tmp_path).problems
    assert problem.startswith("x-000.tar: one.jpg cannot be decoded")


def test_a_wrong_index_is_found(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index["label"][3] += 1
    index["offset"][77] += 512
    np.save(folder / "index.npy", index)
    problems = verify(folder).problems
    assert len(problems) == 2
    assert "has the label" in problems[0]
    np.save(folder / "index.npy", index[:-1])
    (problem,) = verify(folder).problems
    assert "does not belong" in problem


def test_unfinished_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-100])
    assert "is damaged" in verify(folder).problems[0]
    (folder / "manifest.json").unlink()
    for path in (folder, tmp_path / "missing", tmp_path):
        code, out, err = script("verify_shards.py", path)
        assert code == 2 and out == "" and len(err.splitlines()) == 1


# Shards of others


def photos(imagenet_tree: Path, count: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[:count]]


def as_rows(shards: ShardSet) -> list[tuple[bytes, int]]:
    rows = []
    for number, file in enumerate(shards.files):
        tar = Path(file).read_bytes()
        for offset, size, label in shards.index[shards.starts[number] : shards.starts[number + 1]]:
            rows.append((tar[offset : offset + size], int(label)))
    return rows


def encode(photo: bytes, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((64, 64)).save(stream, kind)
    return stream.getvalue()


def write_foreign(folder: Path, imagenet_tree: Path) -> list[tuple[bytes, int]]:
    """Write tars with webdataset's own writer, of all kinds; give the samples that they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    data = photos(imagenet_tree, 12)
    for number in range(3):
        with webdataset.TarWriter(str(folder / f"cc-{number:03d}.tar")) as writer:
            for i, photo in enumerate(data[number * 4 : number * 4 + 4]):
                kind = ("jpg", "jpeg", "png", "webp")[i]
                image = photo if kind[0] == "j" else encode(photo, kind)
                label = number * 4 + i
                sample = {"__key__": f"some/{label:03d}", kind: image, "txt": "a caption"}
                if number == 0:
                    sample["cls"] = str(label).encode()
                elif number == 1:
                    sample["json"] = json.dumps({"label": label, "caption": "x"}).encode()
                writer.write(sample)
                rows.append((image, label if number < 2 else NO_LABEL))
    return rows


def test_foreign_shards_become_usable_as_they_are(imagenet_tree: Path, tmp_path: Path) -> None:
    rows = write_foreign(tmp_path / "cc", imagenet_tree)
    before = {p.name: p.read_bytes() for p in (tmp_path / "cc").iterdir()}
    code, out, err = script("index_shards.py", tmp_path / "cc", "--workers", 2)
    assert code == 0, err
    assert "12 images in 3 shards; 4 have no label" in out
    shards = open_shards(tmp_path / "cc")
    assert as_rows(shards) == rows
    assert {name: (tmp_path / "cc" / name).read_bytes() for name in before} == before
    assert verify(tmp_path / "cc").problems == []
    assert script("index_shards.py", tmp_path / "cc")[0] == 0  # indexing again is allowed


def test_brace_specs_and_an_index_elsewhere(imagenet_tree: Path, tmp_path: Path) -> None:
    rows = write_foreign(tmp_path / "cc", imagenet_tree)
    spec = f"{tmp_path}/cc/cc-{{001..002}}.tar"
    assert script("index_shards.py", spec, "--out", tmp_path / "index", "--split", "val")[0] == 0
    assert as_rows(open_shards(tmp_path / "index")) == rows[4:]
    assert open_shards(tmp_path / "index").split == "val"
    pipe = f"pipe:cat {tmp_path}/cc/cc-{{000..001}}.tar"
    code, out, _ = script("index_shards.py", pipe, "--out", tmp_path / "remote")
    assert code == 0 and "FOLDER+COMMAND" in out
    manifest = (tmp_path / "remote" / "manifest.json").read_text()
    assert f"{tmp_path}" not in manifest  # only the names of the tars, see split_spec
    remote = open_shards(f"{tmp_path}/remote+pipe:cat {tmp_path}/cc/{{}}")
    assert list(remote.files) == [f"pipe:cat {tmp_path}/cc/cc-00{n}.tar" for n in (0, 1)]
    assert len(remote) == 8
    assert script("index_shards.py", pipe)[0] == 2  # --out is missing


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(imagenet_tree: Path, tmp_path: Path, kind: int) -> None:
    data = photos(imagenet_tree, 3)
    with tarfile.open(tmp_path / "long.tar", "w", format=kind) as tar:
        for i, photo in enumerate(data):
            for suffix, content in (("jpg", photo), ("cls", b"%d\n" % i)):
                info = tarfile.TarInfo(f"{'deep/' * 30}{'ü' * 60}{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_shards([str(tmp_path / "long.tar")])
    assert as_rows(open_shards(tmp_path)) == [(photo, i) for i, photo in enumerate(data)]
    assert verify(tmp_path).problems == []


def test_labels_that_are_names(imagenet_tree: Path, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "names.tar")) as writer:
        for i, name in enumerate(["dog", "cat", "dog"]):
            photo = photos(imagenet_tree, 3)[i]
            writer.write({"__key__": f"{i}", "jpg": photo, "json": {"species": name}})
    index_shards([str(tmp_path)], label_key="species")
    shards = open_shards(tmp_path)
    assert shards.classes == ["cat", "dog"]
    assert list(shards.index["label"]) == [1, 0, 1]


def test_bad_foreign_shards(imagenet_tree: Path, intact: Path, tmp_path: Path) -> None:
    def error(*args: object) -> str:
        code, out, err = script("index_shards.py", *args)
        assert code == 2 and out == "" and len(err.splitlines()) == 1, err
        return err

    (tmp_path / "empty").mkdir()
    assert "holds no tars" in error(tmp_path / "empty")
    assert "does not exist" in error(tmp_path / "x-{000..002}.tar")
    assert "written" in error(intact)
    write_foreign(tmp_path / "cut", imagenet_tree)
    path = tmp_path / "cut" / "cc-001.tar"
    path.write_bytes(path.read_bytes()[:50_000])
    assert "cc-001.tar" in error(tmp_path / "cut")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "cut")
    assert "compressed" in error(tmp_path / "packed.tar")
    with webdataset.TarWriter(str(tmp_path / "text.tar")) as writer:
        writer.write({"__key__": "a", "txt": "no image"})
    assert "no images" in error(tmp_path / "text.tar")
    assert not list(tmp_path.rglob("manifest.json"))


def test_opening_what_is_no_shard_folder(intact: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "has no manifest.json"),
        (intact / "manifest.json", "is not a folder of shards"),
        (intact.parent, "did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            open_shards(path)
