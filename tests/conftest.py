"""Fixtures that all tests share. They give real photographs, never drawn images."""

from __future__ import annotations

import getpass
import os
import random
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
from PIL import Image

# A deadline would fail tests where the machine is busy.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# Workers run side by side, so that each has one thread; set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
REPOSITORY = Path(__file__).parents[1]

# A folder with 250 photographs of ImageNet in imagenet_sample_250.tar, for those who have them.
SAMPLES = os.environ.get("MAE_SCALE_TEST_DATA")
CLASSES = 250
SIZES = ((500, 375), (375, 500), (500, 333), (640, 480), (400, 400), (333, 500), (800, 600))

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


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use photographs, and put the tests of the longest files first;
    `--no-loadscope-reorder` lets xdist keep this."""
    for item in items:
        if "imagenet_tree" in getattr(item, "fixturenames", ()):
            item.add_marker("photographs")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let programs keep their temporary files in pytest's folder.

    So pytest removes what a killed program leaves, and nothing touches the developer's own. What
    torch compiles stays in the folder of all sessions.
    """
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    folder = tmp_path_factory.getbasetemp() / "t"
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
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
    """Make an ImageFolder tree `<wnid>/<name>.JPEG` of 250 photographs in 250 classes, of many
    sizes, a few in grey.

    They are pieces of the photographs that scikit-image, scikit-learn and matplotlib ship, or
    ImageNet's own where $MAE_SCALE_TEST_DATA names their folder.
    """
    root = tmp_path_factory.mktemp("imagenet")
    if SAMPLES:
        with tarfile.open(Path(SAMPLES, "imagenet_sample_250.tar")) as tar:
            tar.extractall(root, filter="data")
        return root
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from photographs import TRAIN

    photographs = []
    for path in TRAIN:
        with Image.open(path) as image:
            photographs.append(image.convert("L" if path.stem == "camera" else "RGB"))
    for number in range(CLASSES):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        piece = a_piece(photographs[number % len(photographs)], number // len(photographs))
        piece.save(folder / f"{folder.name}_piece.JPEG", quality=95)
    return root


def a_piece(photograph: Image.Image, number: int) -> Image.Image:
    """Cut a piece out of a photograph: half to all of it, in one of ImageNet's usual sizes."""
    width, height = SIZES[number % len(SIZES)]
    draw = random.Random(number)
    scale = draw.uniform(0.5, 1) * min(photograph.width / width, photograph.height / height)
    left = draw.uniform(0, photograph.width - scale * width)
    top = draw.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)


@pytest.fixture(scope="session")
def shards(imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards of 40 out of the 250 photographs, at 128 pixels so that decoding is quick."""
    out = tmp_path_factory.mktemp("shards") / "with a space" / "train"
    script = REPOSITORY / "data_prep" / "shard_imagenet.py"
    options = "--split train --samples-per-shard 40 --resize-short 128 --workers 2"
    subprocess.run([sys.executable, script, imagenet_tree, out, *options.split()], check=True)
    return out
