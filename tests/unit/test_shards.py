"""Opening shards: from a folder, in another process, over HTTP and through a command."""

from __future__ import annotations

import functools
import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_shards import make_shards

from mae_scale.data.reader import ShardReader
from mae_scale.data.remote import is_remote, join, shown
from mae_scale.data.shards import INDEX_DTYPE, open_shards, shared_images
from mae_scale.errors import UserError
from mae_scale.files import TRUST_INDEX, TRUST_PICKLE


@pytest.fixture(scope="module")
def folder(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[:9]]
    return make_shards(tmp_path_factory.mktemp("shards") / "train", images, [4, 1, 4])


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/train"
        running.shutdown()
        thread.join()


def test_a_folder(folder: Path) -> None:
    shards = open_shards(folder)
    assert len(shards) == 9
    assert list(shards.samples) == [4, 1, 4]
    assert list(shards.starts) == [0, 4, 5, 9]
    assert shards.index.dtype == INDEX_DTYPE
    assert isinstance(shards.index, np.memmap)
    assert [Path(file).stat().st_size for file in shards.files] == list(shards.bytes)
    assert all(Path(file).is_absolute() for file in shards.files)


def test_pickling_leaves_the_index_on_the_disk(folder: Path) -> None:
    shards = open_shards(folder)
    again = pickle.loads(pickle.dumps(shards))
    assert np.array_equal(again.index, shards.index)
    assert isinstance(again.index, np.memmap)
    assert again.fingerprint == shards.fingerprint


def test_remote_shards(folder: Path, server: str, tmp_path: Path) -> None:
    here = open_shards(folder)
    for spec in (server, server + "/", f"pipe:cat {folder}/{{}}"):
        there = open_shards(spec, tmp_path / "cache")
        assert there.fingerprint == here.fingerprint
        assert np.array_equal(there.index, here.index)
        assert all(is_remote(file) for file in there.files)
    assert there.files[1] == f"pipe:cat {folder}/train-000001.tar"
    assert len(list((tmp_path / "cache").iterdir())) == 2  # index and checksums
    with pytest.raises(UserError, match="cache_dir"):
        open_shards(server)


def test_names_are_joined() -> None:
    assert join("https://host/x/", "a.tar") == "https://host/x/a.tar"
    assert join("/data", "/other/a.tar") == "/other/a.tar"
    assert join("/data", "s3://bucket/a.tar") == "s3://bucket/a.tar"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has version 3, this program reads 1 and 2"),
        ({"shards": [{"file": "x"}]}, "is damaged"),
        ({"shards": []}, "holds no samples"),
        ({"shards": None}, "is damaged"),
    ],
)
def test_bad_manifests(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    shutil.copytree(folder, tmp_path / "train")
    path = tmp_path / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path / "train")


def test_a_bad_index(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "train")
    np.save(tmp_path / "train" / "index.npy", np.zeros(9))
    with pytest.raises(UserError, match="does not belong"):
        open_shards(tmp_path / "train")
    (tmp_path / "train" / "index.npy").write_bytes(b"spoilt")
    with pytest.raises(UserError, match="cannot be read"):
        open_shards(tmp_path / "train")


def spoil(folder: Path, copy: Path, change: dict, entry: dict) -> Path:
    """Copy the shards, with other values in the manifest and in the entry of its first shard."""
    shutil.copytree(folder, copy)
    manifest = {**json.loads((copy / "manifest.json").read_bytes()), **change}
    manifest["shards"][0] |= entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    "file",
    ["../x.tar", "a/../../x.tar", "wss://host/x", "a\nb.tar", "\x1b[2J.tar", "", None, 7, ["x"]],
)
def test_names_that_no_writer_gives_are_damage(
    folder: Path, tmp_path: Path, file: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST_INDEX.variable, "1")
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as caught:
        open_shards(spoil(folder, tmp_path / "train", {}, {"file": file}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "file",
    [
        "pipe:touch X; cat y",
        "PIPE:touch X",
        "sftp://host/x.tar",
        "https://host/x.tar",
        "s3://b/x.tar",
    ],
)
def test_commands_and_addresses_are_the_users(
    folder: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = spoil(folder, tmp_path / "train", {}, {"file": file})
    for spec in (copy, f"{copy}+https://other/{{}}", f"{copy}+https://host.evil/{{}}"):
        with pytest.raises(UserError, match=r"not typed; type it .*--trust-index") as caught:
            open_shards(spec)
        assert "touch X" not in str(caught.value)
    with pytest.raises(UserError, match=r"not typed; add --trust-index"):
        open_shards(f"pipe:cat {copy}/{{}}", tmp_path / "cache")
    if file.startswith("https:"):
        assert open_shards(f"{copy}+https://host/{{}}").files[0] == file
    monkeypatch.setenv(TRUST_PICKLE.variable, "1")
    with pytest.raises(UserError, match="--trust-index"):
        open_shards(copy)
    monkeypatch.setenv(TRUST_INDEX.variable, "1")
    assert open_shards(copy).files[0] == file


@pytest.mark.parametrize("absolute", [True, False])
def test_local_tars_may_lie_anywhere(folder: Path, tmp_path: Path, absolute: bool) -> None:
    elsewhere = tmp_path / "elsewhere.tar"
    copy = spoil(folder, tmp_path / "train", {}, {"file": str(elsewhere)} if absolute else {})
    tar = copy / "train-000000.tar"
    tar.rename(elsewhere)
    if not absolute:
        tar.symlink_to(elsewhere)
    reader = ShardReader(open_shards(copy))
    assert reader.read(0).data == ShardReader(open_shards(folder)).read(0).data
    elsewhere.unlink()
    os.mkfifo(elsewhere)  # opening it would wait
    with pytest.raises(UserError, match="a named pipe, not a file"):
        ShardReader(open_shards(copy)).read(0)


def test_a_name_like_a_local_address_is_a_file_of_the_folder(folder: Path, tmp_path: Path) -> None:
    copy = spoil(folder, tmp_path / "train", {}, {"file": "file:/etc/passwd"})
    assert open_shards(copy).files[0] == f"{copy}/file:/etc/passwd"


@pytest.mark.parametrize("name", ["x; touch X", "$(touch X).tar", "-x.tar", "a b.tar", "`x`.tar"])
def test_a_name_is_no_part_of_the_users_command(folder: Path, tmp_path: Path, name: str) -> None:
    copy = spoil(folder, tmp_path / "train", {}, {"file": name})
    for spec in (f"pipe:cat {copy}/{{}}", f"{copy}+pipe:cat {copy}/{{}}"):
        with pytest.raises(UserError, match="cannot stand in a command"):
            open_shards(spec, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({}, {key: value})
        for key in ("samples", "bytes")
        for value in ("4", None, -5, 1e30, float("nan"), 4.0, True, 10**30, [], {})
    ]
    + [({}, {"samples": 5}), ({}, {"bytes": 512}), ({}, {"sha256": "xyz"}), ({}, {"sha256": None})]
    + [({key: value}, {}) for key in ("split", "classes", "made_by") for value in (None, 3, [3])]
    + [({"num_samples": 8}, {}), ({"version": "1"}, {}), ({"version": None}, {})]
    + [({"made_by": {"plan": 3}}, {})],
)  # fmt: skip
def test_a_manifest_whose_fields_do_not_fit_is_one_line(
    folder: Path, tmp_path: Path, change: dict, entry: dict
) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as caught:
        open_shards(spoil(folder, tmp_path / "train", change, entry))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_nests_too_deep_is_damaged(folder: Path, tmp_path: Path) -> None:
    copy = spoil(folder, tmp_path / "train", {}, {})
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is damaged"):
        open_shards(copy)


@pytest.mark.parametrize(
    ("field", "value"), [("offset", -512), ("offset", 2**62), ("offset", 0), ("size", -1)]
)
def test_an_index_that_leads_out_of_its_tar(
    folder: Path, tmp_path: Path, field: str, value: int
) -> None:
    copy = spoil(folder, tmp_path / "train", {}, {})
    index = np.load(copy / "index.npy")
    index[field][3] = value
    np.save(copy / "index.npy", index)
    with pytest.raises(UserError, match=r"index\.npy has an image at bytes"):
        open_shards(copy)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("https://me:word@host/a.tar?sig=SECRET#x", "https://host/a.tar"),
        ("pipe:TOKEN=SECRET curl -H 'X: SECRET' https://me:SECRET@h/0.tar", "pipe:curl … 0.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("/data/a\x1b.tar", "/data/a\\x1b.tar"),
    ],
)
def test_names_are_shown_without_secrets(spec: str, text: str) -> None:
    assert shown(spec) == text


def test_images_in_both_sets_are_counted(tmp_path: Path) -> None:
    one = open_shards(make_shards(tmp_path / "one", [b"a", b"b", b"b", b"c"], [4]))
    other = open_shards(make_shards(tmp_path / "other", [b"b", b"bb", b"d"], [3]))
    assert (shared_images(one, other), shared_images(other, one)) == (2, 1)
