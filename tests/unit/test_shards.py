"""Opening shards: from a folder, in another process, over HTTP and through a command."""

from __future__ import annotations

import functools
import http.server
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_shards import make_shards

from mae_scale.data.shards import INDEX_DTYPE, is_remote, join, open_shards
from mae_scale.errors import UserError


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
    with pytest.raises(UserError, match=r"data\.cache_dir"):
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
