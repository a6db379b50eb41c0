"""Memory: what is recomputed, offloaded, compiled or sharded leaves the losses what they were."""

from __future__ import annotations

import json
import subprocess
import sys
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


def test_sharding_changes_no_initial_weight(plain: Run, tmp_path: Path) -> None:
    settings = {**plain.settings, "deepspeed": "zero1"}
    run = replace(plain, run_dir=tmp_path / "run", settings=settings)
    run.finish()
    for row, expected in zip(run.rows(), plain.rows(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


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


BUILD = """
import json, resource, torch
from mae_scale.config import TrainConfig
from mae_scale.models import build_mae
from mae_scale.train.distributed import World, process_group
from mae_scale.train.engine import fill_deepspeed_config, fill_in

world = World.from_environment()
config = fill_deepspeed_config("zero3", TrainConfig(), world, "fp32")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with process_group(world):
    with torch.device("meta"):
        model = build_mae("mae_vit_large_patch16", depth=12)  # 178 million parameters
    before = peak()
    fill_in(model, 0, config)
    total = sum(parameter.ds_numel for parameter in model.parameters())
    print(json.dumps({"share": (peak() - before) / (4 * total)}))
"""


def test_a_sharded_model_is_never_whole_on_a_rank(tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    run = subprocess.run([*launch, "4", script], check=True, capture_output=True, text=True)
    shares = [json.loads(line)["share"] for line in run.stdout.splitlines() if line[:1] == "{"]
    assert len(shares) == 4
    assert max(shares) < 0.7  # a quarter, one layer whole, and what the heap keeps of those before
