"""A real Slurm for the tests of the templates."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs
from runs import REPOSITORY


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start two nodes, n1 and n2, of four CPUs each; jobs use this Python and this checkout."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (apt: slurm-wlm, munge)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    path = os.pathsep.join([str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split()])
    cluster.env |= {"MAE_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder `slurm/` of a checkout with a space in its name."""
    checkout = tmp_path_factory.mktemp("templates") / "check out"
    checkout.symlink_to(REPOSITORY)
    return checkout / "slurm"
