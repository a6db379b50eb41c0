"""Ways to start inside an allocation without the templates, as docs/slurm.md shows them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from runs import SMALL

pytestmark = pytest.mark.alone

# A user's own batch script; ARGUMENTS is replaced.
SCRIPTS = {
    "srun": "srun {python} -m mae_scale pretrain {arguments}",
    "torchrun": (
        "srun --ntasks-per-node=1 --ntasks=2 {python} -m torch.distributed.run --nnodes=2 "
        "--nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:$((12000 + "
        "SLURM_JOB_ID % 20000)) --rdzv_id=$SLURM_JOB_ID -m mae_scale pretrain {arguments}"
    ),
    "deepspeed": (
        "scontrol show hostnames | sed 's/$/ slots=1/' > hostfile\n"
        "{python} -m deepspeed.launcher.runner --launcher slurm --hostfile hostfile "
        "--master_addr 127.0.0.1 --no_ssh_check {program} pretrain {arguments}"
    ),
    "by hand": "{python} -m mae_scale pretrain {arguments}",
}


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_it_starts(cluster: Cluster, shards: Path, tmp_path: Path, launcher: str) -> None:
    settings = {**SMALL, "run_dir": "run", "data.train": shards, "train.max_steps": 2}
    arguments = [f"'--{key}={value}'" for key, value in settings.items()]
    script = tmp_path / "job.sh"
    command = SCRIPTS[launcher].format(
        python=shlex.quote(sys.executable),
        program=shlex.quote(str(Path(sys.prefix) / "bin" / "mae-scale")),
        arguments=" ".join(arguments),
    )
    script.write_text(f"#!/bin/bash\n{command}\n")
    job = cluster.submit(script, cwd=tmp_path, options="--nodes=2 --ntasks-per-node=1")
    output = job.finish()
    ranks = re.search(r"preflight: \d ranks on (.*?); CPU", output)
    assert ranks is not None, output
    # torchrun decides by itself which node has rank 0.
    expected = ["n1 (1)"] if launcher == "by hand" else ["n1 (1)", "n2 (1)"]
    assert sorted(ranks[1].split(", ")) == expected
    assert "finished: 2 steps" in output
