"""`sbatch slurm/shard_imagenet.sbatch`: an array with a task that is killed or stopped."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from cluster import Cluster, Job
from runs import handles_sigterm

from mae_scale.files import checksums

pytestmark = pytest.mark.alone


def test_an_array_with_a_task_killed(
    cluster: Cluster, templates: Path, imagenet_tree: Path, tmp_path: Path
) -> None:
    template = templates / "shard_imagenet.sbatch"
    whole, out = tmp_path / "whole", tmp_path / "out dir"
    options = ["--split", "train", "--samples-per-shard", "25", "--resize-short", "384"]

    def submit(folder: Path, array: str) -> list[Job]:
        arguments = [imagenet_tree, folder, *options]
        first = cluster.submit(template, *arguments, cwd=tmp_path, options=f"--array={array}")
        low, _, high = array.partition("-")
        return [
            Job(cluster, f"{first.number}_{n}", first.log) for n in range(int(low), int(high) + 1)
        ]

    for task in submit(whole, "0-0"):
        task.finish()
    tasks = submit(out, "1-3")
    _find(tasks[0], 1).kill()
    for task in tasks[1:]:
        task.finish()
    tasks[0].finish("FAILED", 137)
    assert not (out / "manifest.json").exists()
    # The last task of an array has the number of the array: it alone must be requeued.
    tasks = submit(out, "1-3")
    last = _find(tasks[2], 3)
    tasks[2].wait_for(lambda: handles_sigterm(last.pid), "Python")
    last.terminate()
    for task in tasks:
        task.finish()
    assert [task.record()["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert checksums(out) == checksums(whole)


def _find(task: Job, number: int) -> psutil.Process:
    """Find the program of a task of the array."""
    found: list[psutil.Process] = []

    def look() -> bool:
        for process in psutil.process_iter():
            try:
                environment, words = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            expected = (task.cluster.env["SLURM_CONF"], str(number))
            if expected != tuple(map(environment.get, ("SLURM_CONF", "SLURM_ARRAY_TASK_ID"))):
                continue
            if any(word.endswith("shard_imagenet.py") for word in words[:2]):
                found.append(process)
        return bool(found)

    task.wait_for(look, "the task")
    return found[0]
