"""Settings that trade memory for time, under sharding: the losses stay what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run

STEPS = 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Run:
    """ZeRO-3 on two processes, nothing recomputed."""
    settings = {"deepspeed": "zero3", "train.max_steps": STEPS, "data.workers": 0}
    folder = tmp_path_factory.mktemp("plain") / "run"
    run = Run(folder, shards, settings, "torchrun", 2)
    run.finish()
    return run


@pytest.mark.parametrize(("every", "offload"), [("full", False), (2, True), ("full", True)])
def test_recomputing_and_offload_change_no_bit_under_zero3(
    plain: Run, tmp_path: Path, every: str | int, offload: bool
) -> None:
    settings = {"train.activation_checkpointing": every, "train.activation_offload": offload}
    run = replace(plain, run_dir=tmp_path / "run", settings=plain.settings | settings)
    run.finish()
    assert run.rows() == plain.rows()


@pytest.mark.parametrize("every", ["none", "full"])
def test_compiled_blocks_under_zero3(plain: Run, tmp_path: Path, every: str) -> None:
    settings = {
        "train.compile": True,
        "train.activation_checkpointing": every,
        "train.activation_offload": every == "full",
    }
    run = replace(plain, run_dir=tmp_path / "run", settings=plain.settings | settings)
    run.finish()
    for row, expected in zip(run.rows(), plain.rows(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
