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

from mae_scale.data.manifest import remember_index
from mae_scale.data.remote import is_remote, join, shown
from mae_scale.data.shards import INDEX_DTYPE, open_shards, shared_images
from mae_scale.errors import UserError
from mae_scale.files import TRUST


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


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "file",
    [
        "pipe:touch X; cat y", "PIPE:touch X", "sftp://host/x.tar", "../x.tar", "a/../../x.tar",
        "file:/etc/passwd", "a\nb.tar", "\x1b[2J.tar", "", None, 7, ["x"],
    ],
)  # fmt: skip
def test_a_manifest_names_files_of_its_folder_and_no_commands(
    folder: Path, tmp_path: Path, file: object, indexed: bool
) -> None:
    made_by = {"made_by": {"indexed": ["x"]} if indexed else {}}
    copy = spoil(folder, tmp_path / "train", made_by, {"file": file})
    if file == "file:/etc/passwd":  # not a URL for us: a strange name below the folder
        assert open_shards(copy).files[0] == f"{copy}/{file}"
        return
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as caught:
        open_shards(copy)
    assert str(caught.value).isprintable() and "touch X" not in str(caught.value)


@pytest.mark.parametrize("file", ["/etc/passwd", "https://host/x.tar", "s3://b/x.tar"])
def test_absolute_names_and_addresses_come_from_indexing_only(
    folder: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_shards(spoil(folder, tmp_path / "own", {}, {"file": file}))
    made_by = {"made_by": {"indexed": ["x"]}}
    foreign = spoil(folder, tmp_path / "foreign", made_by, {"file": file})
    if file.startswith("/"):  # a folder of somebody else must not choose files on this machine
        with pytest.raises(UserError, match=r"names tars outside of the folder.*--trust"):
            open_shards(foreign)
        monkeypatch.setenv(TRUST, "1")
        assert open_shards(foreign).files[0] == file
        monkeypatch.delenv(TRUST)
        remember_index((foreign / "manifest.json").read_bytes())
    assert open_shards(foreign).files[0] == file


def test_an_index_of_another_user_may_name_that_users_tars(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "x.tar"
    tar.touch()
    made_by = {"made_by": {"indexed": ["x"]}}
    foreign = spoil(folder, tmp_path / "foreign", made_by, {"file": str(tar)})
    with pytest.raises(UserError, match="names tars outside"):
        open_shards(foreign)
    monkeypatch.setattr("os.geteuid", lambda: tar.stat().st_uid + 1)
    assert open_shards(foreign).files[0] == str(tar)
    tar.unlink()  # nobody's
    with pytest.raises(UserError, match="names tars outside"):
        open_shards(foreign)


def test_links_of_others_do_not_lead_out_of_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "train"
    shutil.copytree(folder, copy)
    name = next(path.name for path in copy.glob("*.tar"))
    elsewhere, inside = tmp_path / "elsewhere.tar", copy / "inside.tar"
    (copy / name).rename(elsewhere)
    (copy / name).symlink_to(elsewhere)
    user = os.geteuid()
    assert open_shards(copy)  # one's own links
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    assert open_shards(copy)  # links to tars of the user whose folder it is
    elsewhere.rename(inside)  # now the link leads to nobody's file
    with pytest.raises(UserError, match=r"names tars outside of the folder.*--trust"):
        open_shards(copy)
    (copy / name).unlink()
    (copy / name).symlink_to("inside.tar")
    assert open_shards(copy)
    whole = tmp_path / "whole"
    whole.mkdir()
    for path in copy.iterdir():
        (whole / path.name).symlink_to(path)
    assert open_shards(whole)  # the manifest is a link into the folder that the tars lie in


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
