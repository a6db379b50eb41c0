"""A few of the files that benchmarks/fuzz.py spoils, of each kind; it has tried many thousands."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fuzz import fuzz
from fuzz_targets import TARGETS, Material, Target

EXAMPLES = 4


@pytest.fixture(scope="module")
def material(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Give good files to spoil; runs among them are made when they are first needed."""
    return Material(shards, tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_spoilt_files_are_read_or_refused_in_a_line(material: Material, target: Target) -> None:
    counts = Counter[str]()
    fuzz(target, material, EXAMPLES, 0, counts)
    assert counts["examples"] == counts["read"] + counts["refused"] >= EXAMPLES // 2
