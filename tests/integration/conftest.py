"""Runs of the real command on real shards, in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Run


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Iterator[Run]:
    """A run in a folder of its own."""
    yield Run(tmp_path / "run dir", shards)
