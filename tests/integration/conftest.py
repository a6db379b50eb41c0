"""Runs of the real command on real shards, in processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import VALIDATION_IMAGES, Run


@pytest.fixture(scope="session")
def val_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards of the first 61 photographs, a prime number, with the same list of classes."""
    out = tmp_path_factory.mktemp("shards") / "val"
    shutil.copytree(shards, out)
    for name in ("index.npy", "checksums.npy"):
        np.save(out / name, np.load(out / name)[:VALIDATION_IMAGES])
    manifest = json.loads((out / "manifest.json").read_text())
    first, second = manifest["shards"][:2]  # of 40 each
    manifest["shards"] = [first, {**second, "samples": VALIDATION_IMAGES - first["samples"]}]
    manifest["num_samples"] = VALIDATION_IMAGES
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Iterator[Run]:
    """Give a run in a folder of its own."""
    yield Run(tmp_path / "run dir", shards)
