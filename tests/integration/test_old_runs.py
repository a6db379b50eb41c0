"""Runs that an earlier version began go on bit for bit.

tests/data/old_runs.tar.xz holds run folders of commit be6488a, stopped after 3 steps, with the rows
of metrics.jsonl that this commit gave for the next 2. The shards are pieces of photographs of
scikit-image in the public domain or CC0 (astronaut, camera, coffee, rocket).
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, Run, free_port, in_one_process


class OldRun(Run):
    """A run of the archive, all of whose settings are in its own folder."""

    def arguments(self) -> list[str]:
        """Give the arguments of the command, without its launcher."""
        settings = {**self.settings, "run_dir": self.run_dir, "data.train": self.shards}
        values = {k: self.shards if v == "SHARDS" else v for k, v in settings.items()}
        return [f"--{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("size", [1, 2])
def test_old_runs_go_on(tmp_path: Path, size: int) -> None:
    with tarfile.open(REPOSITORY / "tests/data/old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "old_runs"
    story = json.loads((folder / "story.json").read_text())
    runs = {
        name: OldRun(folder / name, folder / "shards", old["settings"], task=old["task"])
        for name, old in story["runs"].items()
        if old["processes"] == size
    }
    environments = [{}]
    if size > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **meeting}
            for rank in range(size)
        ]
    processes = [
        in_one_process([(run, "") for run in runs.values()], **environment)
        for environment in environments
    ]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert f"exit codes: {[0] * len(runs)}" in output, output
        assert "converting" not in output
    same_kernels = story["cpu"] == torch.backends.cpu.get_cpu_capability()
    wrong = []
    for name, run in runs.items():
        assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5]
        for row, expected in zip(run.rows()[3:], story["runs"][name]["rows"], strict=True):
            # CPUs with other vector units sum in another order.
            right = (
                expected
                if same_kernels
                else {
                    k: v if v is None else pytest.approx(v, rel=1e-5) for k, v in expected.items()
                }
            )
            if row != right:
                wrong.append(f"{name}: {row}, not {expected}")
    assert not wrong, "\n".join(wrong)
