"""Recomputing, offloading, compiling and sharding do not change the losses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Run

STEPS = 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Run:
    """Train under ZeRO-3 on two processes, with nothing recomputed."""
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


def test_an_offloaded_optimiser_in_many_pieces_carries_over(plain: Run, tmp_path: Path) -> None:
    """A run with sub-groups, as in zero3_offload, on two processes goes on under ZeRO-2 on one."""
    file = tmp_path / "small sub-groups.json"
    zero = {"stage": 3, "sub_group_size": 200_000, "stage3_param_persistence_threshold": 0}
    zero["offload_optimizer"] = {"device": "cpu"}  # type: ignore[assignment]
    file.write_text(json.dumps({"zero_optimization": zero}))
    for processes, config, steps in ((2, file, 2), (1, "zero2", STEPS)):
        settings = {**plain.settings, "deepspeed": config, "train.max_steps": steps}
        run = replace(plain, run_dir=tmp_path / "run", settings=settings, processes=processes)
        run.finish()
    for row, expected in zip(run.rows(), plain.rows(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("every", "offload"), [("full", False), (2, True)])
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
import json, resource, sys, torch
from mae_scale.config.sections import TrainConfig
from mae_scale.models import build_mae
from mae_scale.launch.distributed import World, process_group
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import fill_in

world = World.from_environment()
config = fill_deepspeed_config("zero3", TrainConfig(), world, "fp32")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with process_group(world, 600):
    with torch.device("meta"):
        model = build_mae("mae_vit_large_patch16", depth=12)  # 178 million parameters
    before = peak()
    fill_in(model, 0, config)
    total = sum(parameter.ds_numel for parameter in model.parameters())
    share = (peak() - before) / (4 * total)
    sys.stdout.write(json.dumps({"share": share}) + "\\n")  # in one piece, beside other ranks
"""


def test_a_sharded_model_is_never_whole_on_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Freed memory goes back at once, so that resident memory is memory in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    shares = [found["share"] for found in on_ranks(4, BUILD, tmp_path)]
    assert len(shares) == 4
    assert max(shares) < 0.7  # a quarter, one whole layer, and what gloo and DeepSpeed need


REDUCE = """
import json, torch
from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.models import build_mae
from mae_scale.launch.distributed import World, process_group
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine, fill_in

world = World.from_environment()
with process_group(world, 600):
    for stage in range(4):
        for reduce in ("fp32", "bf16"):
            train = TrainConfig(global_batch_size=8, micro_batch_size=2, grad_reduce=reduce)
            config = fill_deepspeed_config(f"zero{stage}", train, world, "bf16")
            with torch.device("meta"):
                model = build_mae("mae_vit_tiny_patch16", img_size=32, patch_size=8, depth=2)
            fill_in(model, 0, config)
            engine = build_engine(model, OptimConfig(), config)
            torch.manual_seed(world.rank)
            for _ in range(2):
                images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
                engine.backward(engine(images, noise)[0])
                engine.step()
            norm = float(engine.get_global_grad_norm())
            if world.rank == 0:
                print(json.dumps({"stage": stage, "reduce": reduce, "norm": norm}))
"""


def test_the_precision_of_the_gradient_reduction_is_a_setting(tmp_path: Path) -> None:
    """Weights are bf16; under stage 0 the sum of two ranks is rounded to bf16 either way."""
    norms = {(f["stage"], f["reduce"]): f["norm"] for f in on_ranks(2, REDUCE, tmp_path)}
    exact = norms[1, "fp32"]
    for stage in range(4):
        assert norms[stage, "fp32"] == pytest.approx(exact, rel=1e-6 if stage > 0 else 1e-2)
        assert norms[stage, "bf16"] == pytest.approx(exact, rel=1e-2)
        assert (norms[stage, "bf16"] != norms[stage, "fp32"]) is (stage > 0)


ACCUMULATE = """
import json, torch
from torch import nn
from mae_scale.config.sections import OptimConfig, TrainConfig
from mae_scale.launch.distributed import World, process_group
from mae_scale.train.deepspeed_config import fill_deepspeed_config
from mae_scale.train.engine import build_engine
from mae_scale.train.nonfinite import StepGuard

world = World()
with process_group(world, 600):
    for stage in range(3):
        train = TrainConfig(global_batch_size=256, micro_batch_size=1)
        config = fill_deepspeed_config(f"zero{stage}", train, world, "bf16")
        engine = build_engine(nn.Linear(1, 1, bias=False), OptimConfig(), config)
        guard = StepGuard(engine)
        for micro in range(2 * 256):
            size = 1.0 if micro % 256 == 0 else 2.0**-9
            engine.backward(engine(torch.full((1, 1), size, dtype=torch.bfloat16)).sum())
            engine.step()
        print(json.dumps({"stage": stage, "norm": 256 * float(guard.grad_norm)}))
"""


def test_micro_batches_are_summed_in_fp32(tmp_path: Path) -> None:
    """A gradient of 1 and 255 of 2 ** -9 are summed; a sum in bf16 would lose each of the small
    ones."""
    for found in on_ranks(1, ACCUMULATE, tmp_path):
        rounded = 2**-7 if found["stage"] == 0 else 1e-6
        assert found["norm"] == pytest.approx(1 + 255 / 512, rel=rounded), found


def on_ranks(processes: int, script: str, tmp_path: Path) -> list[dict[str, float]]:
    """Run a script on so many ranks, and give the JSON lines that it prints."""
    file = tmp_path / "script.py"
    file.write_text(script)
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {processes}"
    command = [sys.executable, *launch.split(), str(file)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
