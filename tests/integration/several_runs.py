"""Train several runs in one process, one after the other, as a notebook does.

    python several_runs.py JSON

JSON is a list of {"task", "run_dir", "arguments", "then"}; "then" is what happens to the run once
it trains: "stop", "hang" or nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mae_scale.tasks.task import main
from mae_scale.world import World


def once_it_trains(run_dir: str, action: Callable[[], None]) -> None:
    def watch() -> None:
        rows = Path(run_dir) / "metrics.jsonl"
        while not rows.exists() or len(rows.read_text().splitlines()) < 3:
            time.sleep(0.02)
        action()

    threading.Thread(target=watch, daemon=True).start()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def hang() -> None:
    for worker in psutil.Process().children():
        worker.suspend()
        print(f"suspended {worker.pid}", flush=True)


if __name__ == "__main__":
    codes = []
    before = signal.getsignal(signal.SIGTERM)
    for run in json.loads(sys.argv[1]):
        action = {"stop": stop, "hang": hang}.get(run["then"])
        if action and World.from_environment().rank == 0:
            once_it_trains(run["run_dir"], action)
        codes.append(main(run["task"], run["arguments"], run["task"]))
        assert signal.getsignal(signal.SIGTERM) is before
    print(f"exit codes: {codes}", flush=True)
    os._exit(0)  # as the program does
