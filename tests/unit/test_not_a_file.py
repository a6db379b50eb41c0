"""A pipe, a socket, a device or a folder in the place of a file gives one line, without waiting."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from make_shards import make_shards

from mae_scale.commands import status
from mae_scale.config.deepspeed import load_deepspeed_config
from mae_scale.config.parsing import parse
from mae_scale.config.pretraining import PretrainConfig
from mae_scale.data.reader import ShardReader
from mae_scale.data.shards import open_shards
from mae_scale.errors import UserError
from mae_scale.inference.images import read_centre
from mae_scale.models.weights import read_weights
from mae_scale.sharding.foreign import index_shards
from mae_scale.sharding.lists import read_classes
from mae_scale.sharding.verify import verify
from mae_scale.tasks.trained import TrainedRun, best_checkpoint
from mae_scale.train.checkpoint import Commit, newest_intact
from mae_scale.train.reading import load_tensors
from mae_scale.train.records import read_metrics
from mae_scale.train.run_dir import add_history, open_run
from mae_scale.watching.run_view import RunView


def _socket(path: Path) -> None:
    """Make a socket; its address may have 107 bytes only, so it is moved to a longer path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
        shutil.move(f"{short}/s", path)


KINDS: dict[str, Callable[[Path], object]] = {
    "named pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: _socket(path),
}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Fail a test that waits, as opening a named pipe would do for ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=KINDS)
def put(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """Put something that is no file into the place of one."""

    def replace(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        KINDS[request.param](path)
        return path

    return replace


@pytest.fixture
def folder(imagenet_tree: Path, tmp_path: Path) -> Path:
    images = [path.read_bytes() for path in sorted(imagenet_tree.glob("*/*"))[:3]]
    return make_shards(tmp_path / "train", images, [2, 1])


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "checksums.npy"])
def test_beside_the_tars(folder: Path, name: str, put: Callable[[Path], Path]) -> None:
    put(folder / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_shards(folder)


def test_a_tar(folder: Path, put: Callable[[Path], Path]) -> None:
    shards = open_shards(folder)
    put(folder / "train-000000.tar")
    with pytest.raises(UserError, match="cannot be read: it is a"):
        ShardReader(shards, None).read(0)
    problems = verify(folder, fast=True).problems
    assert any("cannot be read" in problem for problem in problems), problems
    if not (folder / "train-000000.tar").is_dir():  # folders with the name of a tar are no tars
        with pytest.raises(UserError, match="cannot be read: it is a"):
            index_shards([str(folder)], folder / "index")


def test_a_run_folder(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    run, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    config = parse(PretrainConfig, [f"--run_dir={run}", "--data.train=x"], "x")
    (run / "config.yaml").write_text("task: pretrain\nrun_dir: x\ndata: {train: x}\n")

    put(run / "metrics.jsonl")
    put(run / "history.jsonl")
    put(run / ".lock")
    assert read_metrics(run / "metrics.jsonl") == []
    add_history(run, "started", 0)
    with pytest.raises(
        UserError, match=r"\.lock cannot be opened: it is a|writes no file through a link"
    ):
        open_run(run, config)
    assert "not started" in status.status(RunView(run))

    put(step / "COMMITTED.json")
    assert newest_intact(run) is None
    assert RunView(run).checkpoints == []
    with pytest.raises(OSError, match="it is a"):
        Commit.read(step)

    put(step / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(step / "mp_rank_00_model_states.pt")

    put(run / "classes.json")
    with pytest.raises(UserError, match="no run folder that can be read"):
        TrainedRun.read(step)
    put(run / "config.yaml")
    with pytest.raises(UserError, match="cannot be read: it is a"):
        open_run(run, config)
    with pytest.raises(UserError, match="cannot be read"):
        RunView(run)
    with pytest.raises(UserError):
        best_checkpoint(run)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors", "w.json"])
def test_weights(tmp_path: Path, name: str, put: Callable[[Path], Path]) -> None:
    path = put(tmp_path / name)
    if path.is_dir() and not path.is_symlink():
        torch.save({}, path / "model.pth")
    with pytest.raises(UserError, match="weights"):
        read_weights(path)


def test_what_commands_name(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    path = put(tmp_path / "x")
    for read in (read_classes, load_deepspeed_config, lambda p: read_centre(Path(p), 32, 10**6)):
        with pytest.raises(UserError):
            read(str(path))
    with pytest.raises(UserError):
        parse(PretrainConfig, [f"--config={path}"], "x")
