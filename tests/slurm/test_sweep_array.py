"""`sbatch --array=… slurm/sweep.sbatch`: a task for each row, on two nodes each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, Job
from runs import SMALL

pytestmark = pytest.mark.alone


def test_a_row_for_each_task(
    cluster: Cluster, templates: Path, shards: Path, tmp_path: Path
) -> None:
    """All ranks go from run to run together, without a launcher."""
    small = {**SMALL, "data.workers": 0, "train.epochs": 1, "model.depth": 2}
    classifier = {k: v for k, v in small.items() if not k.startswith(("model.dec", "train.rec"))}
    file = tmp_path / "sampling.yaml"
    file.write_text(yaml.safe_dump({
        "pretrain": {**small, "train.max_steps": 2, "train.reconstruct_every": None},
        "linprobe": {**classifier, "optim.warmup_epochs": 0},
        "rows": [{"name": "random"}, {"name": "grid", "pretrain": {"model.mask_sampling": "grid"}}],
    }))  # fmt: skip
    arguments = [file, f"--data.train={shards}", f"--data.val={shards}", "--run_dir=all runs"]
    first = cluster.submit(
        templates / "sweep.sbatch", *arguments,
        cwd=tmp_path, options="--array=0-1 --nodes=2 --ntasks-per-node=1",
    )  # fmt: skip
    for number in (0, 1):
        log = Job(cluster, f"{first.number}_{number}", first.log).finish()
        assert "preflight: 2 ranks on n1 (1), n2 (1)" in log and "top-1 in percent" in log
    command = [sys.executable, "-m", "mae_scale", "sweep", *map(str, arguments), "--table"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[3:]] == ["random", "grid"]
    results = json.loads((tmp_path / "all runs" / "sweep.json").read_text())
    assert all(row["linprobe"][0] is not None for row in results)
