"""A rank that dies, fails or hangs takes the others down, and they name it.

The ranks are started one by one, as `srun` does: no launcher is there to kill the others.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
import torch.distributed as dist
from runs import Run, free_port, handles_sigterm, ranks

pytestmark = pytest.mark.alone

BOUND_S = 60
"""Seconds within which the others must end; some 7 are usual after a kill, `HANG_S` + 3 after a
stop."""
HANG_S = 20


class Ranks:
    """The processes of a run that has no launcher: only the test watches over them."""

    def __init__(self, run: Run, size: int) -> None:
        run.launcher = ""
        self.run, port = run, str(free_port())
        self.processes = [
            run.start(
                RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
            for rank in range(size)
        ]  # fmt: skip
        while len(run.rows()) < 3:
            for process in self.processes:
                assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        self.family = [psutil.Process(process.pid) for process in self.processes]
        self.family += [child for member in self.family for child in member.children(True)]

    def others_end(self, victim: int) -> list[str]:
        """Wait until the other ranks have ended with exit code 1, and give their outputs."""
        outputs = []
        for rank, process in enumerate(self.processes):
            if rank != victim:
                output, _ = process.communicate(timeout=BOUND_S)
                assert process.returncode == 1, output
                assert "Traceback" not in output
                outputs.append(output)
        return outputs

    def end(self) -> None:
        """End the processes; only a victim that was stopped may still be there."""
        for process in self.processes:
            process.kill()
            process.communicate()
        _, alive = psutil.wait_procs(self.family, timeout=BOUND_S)
        for process in alive:
            process.kill()
        assert not alive


@pytest.fixture
def long_run(run: Run) -> Run:
    run.settings = {
        "train.epochs": 100_000,
        "train.hang_timeout": HANG_S,
        "checkpoint.every_steps": 1000,
        "deepspeed": "zero2",
    }
    return run


@pytest.fixture
def two(long_run: Run) -> Iterator[Ranks]:
    group = Ranks(long_run, 2)
    yield group
    group.end()


@pytest.fixture
def three(long_run: Run) -> Iterator[Ranks]:
    group = Ranks(long_run, 3)
    yield group
    group.end()


HOST = platform.node()


def test_a_killed_rank_is_named(three: Ranks) -> None:
    three.processes[1].kill()
    for output in three.others_end(1):
        assert f"error: lost rank 1 ({HOST}): no sign of life for 5 s" in output


def test_a_killed_rank_0_is_named_though_the_store_was_its_own(three: Ranks) -> None:
    three.processes[0].kill()
    for output in three.others_end(0):
        assert f"error: lost rank 0 ({HOST}): its store does not answer" in output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_named(two: Ranks, victim: int) -> None:
    two.processes[victim].send_signal(signal.SIGSTOP)
    (output,) = two.others_end(victim)
    assert f"error: lost rank {victim} ({HOST})" in output


def test_a_rank_that_hangs_is_named(two: Ranks) -> None:
    """The rank's threads and heartbeat go on, but it waits for a data worker for ever."""
    for worker in psutil.Process(two.processes[1].pid).children():
        worker.suspend()
    outputs = two.others_end(-1)
    for output in outputs:
        assert f"error: rank 1 ({HOST}) hangs: waiting for the data of step" in output
    for rank, place in ((0, "torch/distributed"), (1, "torch/utils/data/dataloader.py")):
        assert place in (two.run.run_dir / "stacks" / f"rank-{rank}.txt").read_text()


def test_the_error_of_a_rank_is_known_to_the_others(two: Ranks) -> None:
    psutil.Process(two.processes[0].pid).children()[0].kill()
    own, other = two.others_end(-1)
    assert "error: a data worker ended unexpectedly" in own
    assert f"error: rank 0 ({HOST}) failed: a data worker ended unexpectedly" in other


@pytest.mark.parametrize(
    ("launcher", "victim", "code"),
    [("torchrun", 0, 1), ("deepspeed", 1, 247)],  # 247: what deepspeed makes of SIGKILL
)
def test_under_a_launcher_a_killed_rank_is_named(
    long_run: Run, launcher: str, victim: int, code: int
) -> None:
    """The store belongs to torchrun under torchrun, and to rank 0 under deepspeed."""
    long_run.launcher, long_run.processes = launcher, 2

    def kill(process: subprocess.Popen[str]) -> None:
        ranks(process)[victim].kill()

    output = long_run.stop(3, kill, code)
    assert f"error: lost rank {victim} ({HOST})" in output


def test_a_rank_whose_others_never_come_can_be_stopped(run: Run) -> None:
    process = run.start(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )  # fmt: skip
    while not handles_sigterm(process.pid):
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=BOUND_S)
    assert process.returncode == 85, output


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_whose_first_rank_leaves_before_they_have_met(run: Run, asked: bool) -> None:
    """Was it asked to stop, it leaves with 85 as rank 0 does; otherwise one line says why."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    process = run.start(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
    )  # fmt: skip
    while not store.check(["groups of rank 1"]):
        time.sleep(0.05)
    if asked:
        process.terminate()
    del store
    output, _ = process.communicate(timeout=BOUND_S)
    assert process.returncode == (85 if asked else 1), output
    assert "Traceback" not in output
    assert ("error: the 2 ranks did not meet at 127.0.0.1" in output) is not asked
