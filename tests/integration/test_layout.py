"""A run goes on when the layout of the optimiser's groups has changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs import REPOSITORY, Run, in_one_process


def test_smaller_sub_groups_convert_the_checkpoint(run: Run) -> None:
    """Only the stored layout tells that another `sub_group_size` has cut the states under
    ZeRO-3."""
    config = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["sub_group_size"] = 20_000
    small = run.run_dir.parent / "small_sub_groups.json"
    small.write_text(json.dumps(config))
    folder = run.run_dir.parent
    whole = replace(run, run_dir=folder / "whole", settings={"deepspeed": "zero3"})
    whole.settings["train.max_steps"] = 4
    before = replace(run, settings={**whole.settings, "train.max_steps": 2})
    after = replace(run, settings={**whole.settings, "deepspeed": str(small)})
    autocast = {"train.precision": "bf16", "train.autocast": True}
    half = replace(before, run_dir=folder / "autocast", settings=before.settings | autocast)
    rest = replace(half, settings=whole.settings | autocast)
    process = in_one_process([(each, "") for each in (whole, before, after, half, rest)])
    output, _ = process.communicate(timeout=300)
    assert "exit codes: [0, 0, 0, 0, 0]" in output, output
    assert output.count("was saved with other groups of the optimiser") == 1, output
    losses = [row["loss"] for row in after.rows()]
    assert len(losses) == 4
    assert losses == pytest.approx([row["loss"] for row in whole.rows()], rel=1e-5)
    # Weights that are fp32 under bf16 are read as they are, and their losses are near.
    assert "converting" not in output.partition("saved with other groups")[2].partition("\n")[2]
    near = [row["loss"] for row in rest.rows()]
    assert len(near) == 4 and near == pytest.approx(losses, rel=0.02) and near != losses
