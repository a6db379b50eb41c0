"""Fixtures shared by all tests: real photographs, never drawn ones."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MAE_SCALE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def imagenet_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageFolder tree `<wnid>/<name>.JPEG`: 250 full-size ImageNet photographs, 250 classes."""
    root = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(DATA / "imagenet_sample_250.tar") as tar:
        tar.extractall(root, filter="data")
    return root
