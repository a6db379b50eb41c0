"""Fixtures that all tests share. They give real photographs, never drawn images."""

from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import warm

# A deadline would fail tests where the machine is busy.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# Workers run side by side, so that each has one thread; set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("MAE_SCALE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
CLASSES = 250

# Files whose tests take longest. Workers begin with them, so that none is left over at the end.
LONGEST = (
    "test_templates.py", "test_guide.py", "test_finetune.py", "test_pretrain.py",
    "test_ablations.py", "test_elastic.py", "test_memory.py", "test_chaos.py", "test_watchdog.py",
    "test_examples.py", "test_watching.py", "test_detect.py", "test_fuzz.py",
    "test_gpu_benchmark.py", "test_plan.py",
)  # fmt: skip

warm.install()

# In the background or under nohup pytest ignores these signals, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_xdist_auto_num_workers() -> int:
    """Give the number of workers that `-n auto` starts: one for each CPU that has 3 GB of
    memory."""
    memory = psutil.virtual_memory().total // (3 * 10**9)
    return max(1, min(len(os.sched_getaffinity(0)), memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; `--no-loadscope-reorder` lets xdist keep this."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let programs keep their temporary files and their memory of indexes in pytest's folder.

    So pytest removes what a killed program leaves, and nothing touches the developer's own. What
    torch compiles stays in the folder of all sessions.
    """
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    for variable, name in (("XDG_STATE_HOME", "state"), ("TMPDIR", "t")):
        folder = tmp_path_factory.getbasetemp() / name
        folder.mkdir()
        os.environ[variable] = str(folder)
    tempfile.tempdir = None  # read $TMPDIR again


@pytest.fixture(autouse=True)
def launchers_variables() -> Iterator[None]:
    """Remove after each test the variables that launchers set, so that no later test sees them."""

    def set_now() -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if re.search("RANK|SIZE$|^MASTER_", k)}

    before = set_now()
    yield
    assert set_now() == before


@pytest.fixture(scope="session")
def imagenet_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an ImageFolder tree `<wnid>/<name>.JPEG` of 250 photographs in 250 classes, a few in
    grey.

    ImageNet's own where the sample is at hand ($MAE_SCALE_TEST_DATA or ../shared/data); else
    pieces of the photographs that scikit-image, scikit-learn and matplotlib ship.
    """
    root = tmp_path_factory.mktemp("imagenet")
    sample = DATA / "imagenet_sample_250.tar"
    if sample.exists():
        with tarfile.open(sample) as tar:
            tar.extractall(root, filter="data")
        return root
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from photographs import TRAIN, pieces

    images = [
        image.convert("L") if number % 20 == 0 and photograph.stem == "camera" else image
        for photograph in TRAIN
        for number, image in enumerate(pieces(photograph, side=300, stride=32))
    ]
    for number in range(CLASSES):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        name = f"{folder.name}_piece.JPEG"
        images[number * len(images) // CLASSES].save(folder / name, quality=92)
    return root


@pytest.fixture(scope="session")
def shards(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards of 40 out of the 250 photographs, at 128 pixels so that decoding is quick."""
    out = tmp_path_factory.mktemp("shards") / "with a space" / "train"
    script = REPOSITORY / "data_prep" / "shard_imagenet.py"
    options = "--split train --samples-per-shard 40 --resize-short 128 --workers 2"
    subprocess.run([sys.executable, script, imagenet_tree, out, *options.split()], check=True)
    return out
