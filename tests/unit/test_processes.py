"""Worker processes: results, errors, and an end without delay at any moment."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mae_scale.errors import UserError
from mae_scale.sharding.processes import WorkerKilled, run_all, shared


def times_shared(item: int) -> tuple[int, int]:
    return item, item * shared()


def test_each_item_is_worked_on_once() -> None:
    for workers in (1, 2, 5):
        found = dict(run_all(times_shared, range(20), workers, 3))
        assert found == {i: 3 * i for i in range(20)}
    assert list(run_all(times_shared, [], 2)) == []


def fail(item: int) -> None:
    raise UserError(f"item {item}")


def test_an_error_of_a_worker_is_the_callers() -> None:
    with pytest.raises(UserError, match="item 7"):
        list(run_all(fail, [7], 2))


def die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerKilled, match="was killed"):
        list(run_all(die, range(4), 2))


STREAM = """
import signal
from mae_scale.sharding.processes import run_all

def big(item):
    return bytes(300_000)  # more than a pipe holds: a kill comes in the middle of a message

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
print("ready", flush=True)
try:
    for _ in run_all(big, range(1_000_000), 3):
        pass
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_an_interrupt_at_any_moment_ends_it_at_once() -> None:
    for _ in range(20):
        run = subprocess.Popen([sys.executable, "-c", STREAM], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(random.random() * 0.1)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
        assert (run.returncode, out) == (0, "stopped\n")


AT_THE_START = """
import os, signal, threading, time
from multiprocessing.context import ForkProcess
from mae_scale.sharding.processes import run_all

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()  # takes the signal
start = ForkProcess.start

def start_and_interrupt(process):
    start(process)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

ForkProcess.start = start_and_interrupt
try:
    for _ in run_all(str, range(1_000_000), 3):
        pass
except KeyboardInterrupt:
    print("stopped")
"""


def test_an_interrupt_while_a_process_is_started_leaves_none_behind() -> None:
    """Otherwise Python would wait at exit for a process that nobody gives work or kills."""
    run = subprocess.run([sys.executable, "-c", AT_THE_START], capture_output=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, b"stopped\n"), run.stderr
