"""Runs of the real command on real shards, in processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import Run


@pytest.fixture(scope="session")
def val_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards of the first 241 photographs, a prime number, with the same list of classes."""
    out = tmp_path_factory.mktemp("shards") / "val"
    shutil.copytree(shards, out)
    for name in ("index.npy", "checksums.npy"):
        np.save(out / name, np.load(out / name)[:241])
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][-1]["samples"] -= 9
    manifest["num_samples"] -= 9
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Iterator[Run]:
    """Give a run in a folder of its own."""
    yield Run(tmp_path / "run dir", shards)
