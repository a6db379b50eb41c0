"""`sbatch slurm/shard_imagenet.sbatch`: an array, one of whose tasks is killed."""

from __future__ import annotations

from pathlib import Path

import psutil
from cluster import Cluster, Job

from mae_scale.files import checksums


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
    killed = _kill_task(tasks[0], 1)
    for task in tasks[1:]:
        task.finish()
    tasks[0].finish("FAILED", 137)
    assert killed and not (out / "manifest.json").exists()
    for task in submit(out, "1-3"):
        task.finish()
    assert checksums(out) == checksums(whole)


def _kill_task(task: Job, number: int) -> list[int]:
    """Kill the processes of a task of the array once they write."""
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
    for process in found:
        process.kill()
    return [process.pid for process in found]
