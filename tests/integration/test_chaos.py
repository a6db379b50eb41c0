"""A few of the faults of benchmarks/chaos.py, which has hundreds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos_chain import Chain
from chaos_faults import ALONE, DEEPSPEED, SRUN, TORCHRUN

pytestmark = pytest.mark.alone

ON_ONE_PROCESS = [
    (ALONE, "truncated file", "any"),
    (ALONE, "disk full", "any"),
    (ALONE, "SIGUSR1", "save: begun"),
    (ALONE, "reader gone", "any"),
    (ALONE, "no room for records", "any"),
    (ALONE, "commit of another run", "any"),
]
ON_TWO = [
    (SRUN, "SIGKILL a rank", "save: begun"),
    (TORCHRUN, "SIGKILL launcher", "any"),
    (DEEPSPEED, "SIGTERM twice", "any"),
    (SRUN, "read-only folder", "any"),
    (SRUN, "flipped bit", "save: committed"),
]


@pytest.mark.parametrize(("processes", "faults"), [(1, ON_ONE_PROCESS), (2, ON_TWO)])
def test_a_run_survives(
    tmp_path: Path, shards: Path, processes: int, faults: list[tuple[str, str, str]]
) -> None:
    chain = Chain(tmp_path / "chain", shards, processes)
    for launch, fault, moment in faults:
        chain.leg(launch, fault, moment)
    chain.finish()
