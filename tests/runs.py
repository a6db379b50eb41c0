"""Runs of the real command on real shards, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mae_scale.train.records import read_metrics

REPOSITORY = Path(__file__).parents[1]

# A model that makes a step in a fraction of a second; 13 steps of an epoch on 100 photographs.
SMALL = {
    "model.name": "mae_vit_tiny_patch16",
    "model.img_size": 32,
    "model.patch_size": 8,
    "model.depth": 2,
    "model.decoder_depth": 1,
    "data.workers": 1,
    "data.lanes": 4,
    "data.window": 16,
    "train.epochs": 2,
    "train.global_batch_size": 24,
    "train.micro_batch_size": 4,
    "train.log_every": 1,
    "train.reconstruct_every": "null",
    "optim.warmup_epochs": 1,
    "checkpoint.every_minutes": "null",
}
VALIDATION_IMAGES = 61  # images in the shards of the fixture `val_shards`
PRETRAINING = ("model.decoder", "train.reconstruct")  # keys that other tasks lack


@dataclass
class Run:
    """One `mae-scale pretrain`, or another task, and its folder.

    Args:
        run_dir: folder of the run.
        shards: folder of shards to train on.
        settings: config keys beside those of `SMALL`.
        launcher: "" for none, or torchrun or deepspeed.
        processes: number of processes that the launcher starts.
        task: name of the task that trains.
    """

    run_dir: Path
    shards: Path
    settings: dict[str, Any] = field(default_factory=dict)
    launcher: str = ""
    processes: int = 1
    task: str = "pretrain"

    def arguments(self) -> list[str]:
        """Give the arguments of the command, without its launcher."""
        small = {
            key: value
            for key, value in SMALL.items()
            if self.task == "pretrain" or not key.startswith(PRETRAINING)
        }
        settings = {**small, "run_dir": self.run_dir, "data.train": self.shards, **self.settings}
        return [f"--{key}={value}" for key, value in settings.items()]

    def command(self) -> list[str]:
        """Give the command as a user types it."""
        n = self.processes
        port = free_port()
        # The `deepspeed` script itself does not start from a virtual environment whose path has a
        # space in it; the module is the same program.
        launch = {
            "": "-m mae_scale",
            "torchrun": f"-m torch.distributed.run --standalone --nproc_per_node {n} -m mae_scale",
            "deepspeed": f"-m deepspeed.launcher.runner --num_gpus {n} --master_port {port} "
            "--module mae_scale",
        }[self.launcher]
        return [sys.executable, *launch.split(), self.task, *self.arguments()]

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Start the run in a process group of its own, as a shell does."""
        return subprocess.Popen(
            self.command(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            cwd=self.shards.parent,  # a folder other than the checkout
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def finish(self, code: int = 0) -> str:
        """Run the command to its end, check the exit code, and give its output."""
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def stop(self, at_step: int, how: Callable[[subprocess.Popen[str]], None], code: int) -> str:
        """Start the run, call `how` once the metrics have `at_step`, and wait for its end."""
        process = self.start()
        family = psutil.Process(process.pid)
        while process.poll() is None and len(self.rows()) < at_step:
            time.sleep(0.02)
        children = family.children(recursive=True)
        how(process)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, f"left behind: {alive}\n{output}"
        return output

    def rows(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Give the rows of a record without the values that depend on the clock and the machine."""
        clock = ("images_per_second", "data_wait", "memory_gb", "time")
        rows = read_metrics(self.run_dir / file)
        return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def in_one_process(runs: list[tuple[Run, str]], **environment: str) -> subprocess.Popen[str]:
    """Start a process that trains the runs one after the other.

    Args:
        runs: pairs of a run and what is to happen to it: "stop", "hang" or "" for nothing.
        environment: variables of the process.
    """
    told = [
        {"task": run.task, "run_dir": str(run.run_dir), "arguments": run.arguments(), "then": then}
        for run, then in runs
    ]
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "tests/integration/several_runs.py", json.dumps(told)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Give the training processes of a run, without launchers and data workers."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    found = {}
    for member in family:
        if member.name().startswith("rank "):  # see warm.py
            found.setdefault(member.name(), member)  # the parent of its data workers
        elif "mae_scale" in " ".join(member.cmdline()[:4]) and "RANK" in member.environ():
            found.setdefault(f"rank {member.environ()['RANK']}", member)
    return [found[rank] for rank in sorted(found)]


def handles_sigterm(pid: int) -> bool:
    """Return whether a process handles SIGTERM itself."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(number: signal.Signals) -> Callable[[subprocess.Popen[str]], None]:
    """Make a function that sends a signal to the process that was started."""
    return lambda process: process.send_signal(number)
