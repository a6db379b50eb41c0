"""Remote shards from a server on loopback that fails, stalls and cuts off."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
import warm
from make_disks import full_disk, read_only_disk
from make_shards import make_shards

from mae_scale.data import cache as cache_module
from mae_scale.data.cache import FetchError, ShardCache, read_remote
from mae_scale.data.loader import EvalLoader, TrainLoader
from mae_scale.data.remote import is_remote
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.sharding.foreign import index_shards

SAMPLES = [20, 20, 20, 20]


class Server(ThreadingHTTPServer):
    """Server of a folder. `trouble[name]` lists what happens to the next requests for a file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.trouble: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.requests[name] += 1
            trouble = (self.server.trouble.get(name) or ["none"]).pop(0)
        path = self.server.folder / name
        if trouble == "fail":
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        if trouble != "short":  # a length that is not announced cannot be missed by curl
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if trouble == "none":
            time.sleep(0.05)  # long enough for others to ask meanwhile
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if trouble == "stall":
            time.sleep(30)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, imagenet_tree: Path) -> Path:
    images = [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*.JPEG"))]
    small = sorted(images, key=len)[: sum(SAMPLES)]
    even = [image for first in range(4) for image in small[first::4]]  # shards of about one size
    return make_shards(tmp_path_factory.mktemp("remote"), even, SAMPLES)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http: with curl, which is not installed")
    with Server(folder) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait seconds, not minutes, for a transfer. (curl waits 2 s more after each error 500.)"""
    monkeypatch.setattr(cache_module, "_WAIT_S", 0.01)
    monkeypatch.setattr(cache_module, "_STALL_S", 1.0)


NAME = "train-000001.tar"


def content_of(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


def files_in(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"*{ending}"))


def test_a_full_disk_is_named_at_once(server: Server, folder: Path, tmp_path: Path) -> None:
    size = (folder / NAME).stat().st_size
    with full_disk(tmp_path / "disk") as disk:
        cache = ShardCache(disk / "cache")
        with pytest.raises(FetchError, match=r"does not fit into the cache folder .*cache_gb"):
            cache.open(f"{server.url}/{NAME}", size)
        assert not files_in(disk / "cache", ".part")
    assert server.requests.get(NAME, 0) <= 1  # trying again would not help


def test_a_read_only_folder_for_the_index_is_named(server: Server, tmp_path: Path) -> None:
    said = pytest.raises(UserError, match=r"the cache folder .* cannot be written: .*cache_dir")
    with read_only_disk(tmp_path / "disk") as disk, said:
        open_shards(server.url, disk / "cache")
    upper = f"HTTP{server.url[4:]}"  # a scheme may be written in capitals
    assert len(open_shards(upper, tmp_path / "cache")) == sum(SAMPLES)
    with pytest.raises(UserError, match="unknown scheme; known: https:, http:"):
        open_shards("wss://host/x", tmp_path / "cache")


def test_a_shard_is_fetched_once_and_kept(server: Server, folder: Path, tmp_path: Path) -> None:
    expected = (folder / NAME).read_bytes()
    for _ in range(3):
        cache = ShardCache(tmp_path / "new" / "cache")
        assert content_of(cache.open(f"{server.url}/{NAME}", len(expected))) == expected
    assert server.requests == {NAME: 1}
    # Another version of the dataset has other shards under the same names.
    other = ShardCache(tmp_path / "new" / "cache", version="2")
    assert content_of(other.open(f"{server.url}/{NAME}", len(expected))) == expected
    assert server.requests == {NAME: 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble", [["fail"], ["stall", "stall"], ["cut"], ["short"], ["fail", "stall", "cut", "short"]]
)
def test_trouble_that_passes_is_got_over(
    server: Server, folder: Path, tmp_path: Path, trouble: list[str]
) -> None:
    expected = (folder / NAME).read_bytes()
    server.trouble[NAME] = list(trouble)
    got = ShardCache(tmp_path).open(f"{server.url}/{NAME}", len(expected))
    assert content_of(got) == expected
    assert server.requests[NAME] == len(trouble) + 1
    assert [path.read_bytes() for path in files_in(tmp_path, ".tar")] == [expected]
    assert not files_in(tmp_path, ".part")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("fail", "nothing came for 1 s"),  # curl goes on trying until then
        ("stall", "nothing came for 1 s"),
        ("cut", "status 18"),
        ("short", r"bytes came of"),
        ("missing", "status 22"),
    ],
)
def test_trouble_that_lasts_is_an_error_that_names_the_shard(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    trouble: str, why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache_module, "_TRIES", 2)
    name = "train-999999.tar" if trouble == "missing" else NAME
    server.trouble[name] = [trouble] * 10
    size = (folder / NAME).stat().st_size
    with pytest.raises(FetchError, match=rf"{name} cannot be fetched \(2 tries\): .*{why}"):
        ShardCache(tmp_path).open(f"{server.url}/{name}", size)
    assert not files_in(tmp_path, ".tar")
    assert not files_in(tmp_path, ".part")
    assert not warm.children()


def test_a_shard_of_another_size_is_refused(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_TRIES", 2)
    size = (folder / NAME).stat().st_size
    for wrong, words in ((size - 512, "more than"), (size + 512, f"{size} bytes came of")):
        with pytest.raises(FetchError, match=words):
            ShardCache(tmp_path).open(f"{server.url}/{NAME}", wrong)
    assert not files_in(tmp_path, ".tar")


def test_a_shard_of_the_same_size_with_another_content_is_refused(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_TRIES", 2)
    content = (folder / NAME).read_bytes()
    right = hashlib.sha256(content).hexdigest()
    url, cache = f"{server.url}/{NAME}", ShardCache(tmp_path)
    with pytest.raises(FetchError, match="has another SHA-256 than when it was indexed"):
        cache.open(url, len(content), hashlib.sha256(b"before").hexdigest())
    assert not files_in(tmp_path, ".tar")
    assert content_of(cache.open(url, len(content), right)) == content


def test_foreign_shards_are_indexed_and_read_from_a_server(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    local = open_shards(folder)
    spec = f"{server.url}/train-{{000000..{len(local.files) - 1:06d}}}.tar"
    index_shards([spec], tmp_path / "index", workers=2)
    remote = open_shards(f"{tmp_path}/index+{server.url}/{{}}")
    assert all(is_remote(file) for file in remote.files)
    assert remote.index.tolist() == local.index.tolist()
    batches = [
        list(EvalLoader(shards, img_size=32, batch_size=8, rank=0, world_size=1, workers=0,
                        cache_dir=tmp_path / "cache"))
        for shards in (local, remote)
    ]  # fmt: skip
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_pipes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_TRIES", 2)
    path = folder / NAME
    size = path.stat().st_size
    cache = ShardCache(tmp_path)
    assert content_of(cache.open(f"pipe:cat '{path}' | cat", size)) == path.read_bytes()
    with pytest.raises(FetchError, match="status 3"):
        cache.open(f"pipe:cat '{path}'; exit 3", size)
    with pytest.raises(FetchError, match="nothing came"):
        cache.open("pipe:sleep 98765 | cat", size)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "98765"]
    ]
    assert read_remote("pipe:printf abc") == b"abc"


def test_nothing_is_written_through_a_link(server: Server, folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    cache, size = ShardCache(tmp_path / "cache"), (folder / NAME).stat().st_size
    url = f"{server.url}/{NAME}"
    os.close(cache.open(url, size))
    copy = files_in(tmp_path / "cache", ".tar")[0]
    copy.unlink()
    copy.with_suffix(".part").symlink_to(precious)
    with pytest.raises(OSError, match="it is a link"):
        cache.open(url, size)
    (tmp_path / "cache" / "room.lock").unlink()
    (tmp_path / "cache" / "room.lock").symlink_to(precious)
    with pytest.raises(UserError, match="it is a link"):
        ShardCache(tmp_path / "cache")
    assert precious.read_text() == "x"


def test_s3_goes_through_the_aws_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script with the arguments of `aws` stands for that command, which is not installed here."""
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3 $4" = "s3 cp s3://b/{NAME} -" ] && cat "{folder}/{NAME}"\n'
    )
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{aws.parent}:{os.environ['PATH']}")
    expected = (folder / NAME).read_bytes()
    cache = ShardCache(tmp_path / "cache")
    assert content_of(cache.open(f"s3://b/{NAME}", len(expected))) == expected


def fetch(url: str, size: int, cache: Path, digest: str, max_bytes: int | None = None) -> None:
    assert (
        hashlib.sha256(content_of(ShardCache(cache, max_bytes).open(url, size))).hexdigest()
        == digest
    )


def test_many_processes_fetch_a_shard_once(server: Server, folder: Path, tmp_path: Path) -> None:
    content = (folder / NAME).read_bytes()
    server.trouble[NAME] = ["cut"]
    arguments = (
        f"{server.url}/{NAME}",
        len(content),
        tmp_path,
        hashlib.sha256(content).hexdigest(),
    )
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert server.requests[NAME] == 2


def test_a_fetcher_that_is_killed_leaves_nothing_that_counts(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    expected = (folder / NAME).read_bytes()
    url = f"{server.url}/{NAME}"
    server.trouble[NAME] = ["stall"]
    code = (
        "import sys; from mae_scale.data.cache import ShardCache;"
        "ShardCache(sys.argv[1]).open(sys.argv[2], int(sys.argv[3]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), url, str(len(expected))], start_new_session=True
    )
    while not server.requests[NAME]:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not files_in(tmp_path, ".tar")
    # The partial file is removed for others, though nobody asks for that shard again.
    other = "train-000000.tar"
    size = (folder / other).stat().st_size
    cache = ShardCache(tmp_path, max_bytes=size + 1000)
    os.close(cache.open(f"{server.url}/{other}", size))
    assert not files_in(tmp_path, ".part")
    assert content_of(ShardCache(tmp_path).open(url, len(expected))) == expected


def test_the_least_recently_used_goes(server: Server, folder: Path, tmp_path: Path) -> None:
    names = [f"train-{i:06d}.tar" for i in range(4)]
    sizes = {name: (folder / name).stat().st_size for name in names}
    limit = sum(sizes.values()) - 1  # three fit, four do not
    cache = ShardCache(tmp_path, limit)
    for name in [*names[:3], names[0], names[3], names[0], names[1]]:
        descriptor = cache.open(f"{server.url}/{name}", sizes[name])
        assert content_of(descriptor) == (folder / name).read_bytes()
        assert sum(path.stat().st_size for path in files_in(tmp_path, ".tar")) <= limit
    assert server.requests == {names[0]: 1, names[1]: 2, names[2]: 1, names[3]: 1}


def test_a_copy_that_goes_can_be_read_to_the_end(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    names = ["train-000000.tar", "train-000001.tar"]
    sizes = [(folder / name).stat().st_size for name in names]
    cache = ShardCache(tmp_path, max(sizes))
    first = cache.open(f"{server.url}/{names[0]}", sizes[0])
    os.close(cache.open(f"{server.url}/{names[1]}", sizes[1]))
    assert len(files_in(tmp_path, ".tar")) == 1
    assert content_of(first) == (folder / names[0]).read_bytes()


def test_processes_that_want_more_than_fits_take_turns(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    names = [f"train-{i:06d}.tar" for i in range(4)]
    contents = [(folder / name).read_bytes() for name in names]
    limit = max(map(len, contents))  # one at a time
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=fetch,
            args=(f"{server.url}/{name}", len(content), tmp_path,
                  hashlib.sha256(content).hexdigest(), limit),
        )
        for name, content in zip(names * 2, contents * 2, strict=True)
    ]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert sum(path.stat().st_size for path in files_in(tmp_path, ".tar")) <= limit


def test_limits_and_folders_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1,000 bytes and does not fit into .* 999; raise"):
        ShardCache(tmp_path, 999).open("http://127.0.0.1:1/a.tar", 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache folder .*file/cache cannot be written"):
        ShardCache(tmp_path / "file" / "cache")


# ---- the loader on remote shards


def train_loader(shards: ShardSet, **changes: object) -> TrainLoader:
    settings: dict = {
        "img_size": 32, "seed": 0, "lanes": 4, "window": 10, "global_batch_size": 16,
        "micro_batch_size": 16, "rank": 0, "world_size": 1, "workers": 2,
    }  # fmt: skip
    return TrainLoader(shards, **{**settings, **changes})


def stream(loader: TrainLoader, batches: int) -> torch.Tensor:
    got = [batch["image"] for batch in islice(loader, batches)]
    loader.close()
    return torch.stack(got)


def remote(shards: ShardSet, server: Server) -> ShardSet:
    files = [f"{server.url}/{Path(file).name}" for file in shards.files]
    return replace(shards, files=files, root=server.url)


@pytest.mark.slow
def test_the_loader_reads_remote_shards_as_local_ones(
    server: Server, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = open_shards(folder)
    # One lane has room for two of four shards: some are removed, and fetched again next epoch.
    limit = 2 * int(local.bytes.max())
    server.trouble = {NAME: ["cut", "stall"], "train-000003.tar": ["short", "fail"]}
    loader = train_loader(
        remote(local, server), lanes=1, cache_dir=tmp_path / "two", cache_bytes=limit
    )
    assert not caplog.text
    assert torch.equal(stream(loader, 10), stream(train_loader(local, lanes=1), 10))
    assert sum(server.requests.values()) > 4 + 4
    assert sum(path.stat().st_size for path in files_in(tmp_path / "two", ".tar")) <= limit
    # Four lanes read all four shards at a time, which is more than there is room for.
    expected = stream(train_loader(local), 10)
    loader = train_loader(remote(local, server), cache_dir=tmp_path / "two", cache_bytes=limit)
    assert "4 lanes of" in caplog.text
    assert torch.equal(stream(loader, 10), expected)
    assert sum(path.stat().st_size for path in files_in(tmp_path / "two", ".tar")) <= limit
    # With room for all, each is fetched once by the workers of two ranks and two runs.
    server.requests.clear()
    for rank in (0, 1, 0):
        loader = train_loader(
            remote(local, server), cache_dir=tmp_path / "all", rank=rank, world_size=2,
            micro_batch_size=8,
        )  # fmt: skip
        assert torch.equal(stream(loader, 6), expected[:6, rank::2])
    assert server.requests == {Path(file).name: 1 for file in local.files}


def test_the_loader_names_a_shard_that_does_not_come(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_TRIES", 2)
    shards = remote(open_shards(folder), server)
    with pytest.raises(UserError, match=r"cache_dir"):
        train_loader(shards)
    server.trouble[NAME] = ["cut"] * 100
    loader = train_loader(shards, cache_dir=tmp_path)
    with pytest.raises(FetchError, match=rf"{NAME} cannot be fetched \(2 tries\)"):
        stream(loader, 10)
    assert not warm.children()


@pytest.mark.slow
def test_closing_ends_a_fetch_that_hangs(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_STALL_S", 600.0)
    for name in [f"train-{i:06d}.tar" for i in range(4)]:
        server.trouble[name] = ["stall"]
    loader = train_loader(remote(open_shards(folder), server), cache_dir=tmp_path)
    waiting = threading.Thread(target=lambda: next(iter(loader), None), daemon=True)
    waiting.start()
    while sum(server.requests.values()) < 4:
        time.sleep(0.05)
    processes = warm.children()
    assert len(processes) >= 2 + 4  # two workers, four times curl
    loader.close()
    assert not psutil.wait_procs(processes, timeout=30)[1]
