"""The faults of chaos.py: what they are called, how they strike, and which exit code follows."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from chaos_chain import Chain

ALONE, SRUN, TORCHRUN, DEEPSPEED = "alone", "srun", "torchrun", "deepspeed"
STOPPING = ("SIGTERM", "SIGUSR1", "SIGTERM twice", "SIGKILL launcher", "SIGTERM launcher")
DAMAGE = (
    "truncated file",
    "flipped bit",
    "missing file",
    "empty file",
    "commit of another run",
)
FAILING = ("disk full", "read-only folder", "worker killed")
OUTPUTS = (
    "output closed",
    "output full",
    "output read-only",
    "reader gone",
    "reader stuck",
    "terminal gone",
)
SILENT = ("output closed", "output full", "output read-only")  # the output of the run is lost
CLOCKS = ("clock forward", "clock back")
WITH_PREPARATION = ("read-only folder", "output closed")  # see `Output.prepare`
# After these the run goes on; it is stopped by SIGTERM two steps later.
LASTING = (
    *OUTPUTS,
    *CLOCKS,
    "rank stopped",
    "/dev/shm full",
    "no room for records",
    "shards replaced",
    "shards away",
)
# After these the run may also end with exit code 1, when it needs what is missing.
PERHAPS_FAILING = ("/dev/shm full", "shards away")
SMALL_SHARED_MEMORY = (
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs -o size=64m chaos /dev/shm && exec "$@"', "sh",
)  # fmt: skip
DAY_S = 86400.0


class Output:
    """Standard output and error of a leg.

    Args:
        fault: fault that strikes; one of `OUTPUTS` says how the outputs fail.
        log: file for the output that can be read.
    """

    def __init__(self, fault: str, log: Path) -> None:
        self._fault = fault
        self.reader: subprocess.Popen[bytes] | None = None
        self._log = log.open("wb")
        self._others: list[int] = []
        if fault == "output full":
            self.descriptor = os.open("/dev/full", os.O_WRONLY)
        elif fault == "output read-only":
            self.descriptor = os.open(os.devnull, os.O_RDONLY)
        elif fault in ("reader gone", "reader stuck", "terminal gone"):
            pair = os.openpty() if fault == "terminal gone" else os.pipe()
            source, self.descriptor = pair
            self.reader = subprocess.Popen(["cat"], stdin=source, stdout=self._log)
            os.close(source)
        else:
            self.descriptor = self._log.fileno()

    def prepare(self) -> None:
        """Run in each child process before the command."""
        obey_permissions()
        if self._fault == "output closed":
            os.close(1)
            os.close(2)

    def close(self) -> None:
        """Close the files, and wait for the reader."""
        if self.descriptor != self._log.fileno():
            os.close(self.descriptor)
        if self.reader is not None:
            self.reader.kill()
            self.reader.wait()
        self._log.close()


def lasting(
    chain: Chain, victim: psutil.Process, ranks: list[psutil.Process], fault: str
) -> Callable[[], None]:
    """Let a fault strike that a run survives, and return a function that undoes it."""
    reader = chain.output_of_leg.reader if chain.output_of_leg is not None else None
    if fault in ("reader gone", "terminal gone"):
        assert reader is not None
        reader.kill()
    elif fault == "reader stuck":
        assert reader is not None
        reader.send_signal(signal.SIGSTOP)
        return lambda: reader.send_signal(signal.SIGCONT)
    elif fault == "rank stopped":
        victim.suspend()
        time.sleep(3)
        victim.resume()
    elif fault in CLOCKS:
        jump = DAY_S if fault == "clock forward" else -DAY_S
        with chain.clock.open("r+b") as file:
            file.write(struct.pack("d", jump))
    elif fault == "/dev/shm full":
        filler = Path(f"/proc/{victim.pid}/root/dev/shm/filler")
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
    elif fault == "no room for records":
        size = (chain.run_dir / "metrics.jsonl").stat().st_size
        limits = [resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) for rank in ranks]
        for rank, (_, hard) in zip(ranks, limits, strict=True):
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (size, hard))

        def give_back() -> None:
            for rank, limit in zip(ranks, limits, strict=True):
                with contextlib.suppress(OSError):
                    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, limit)

        return give_back
    elif fault == "shards replaced":
        for path in chain.data.iterdir():
            copy = path.with_name(f"{path.name}.new")
            shutil.copy(path, copy)
            copy.replace(path)
    elif fault == "shards away":
        away = chain.data.with_name("away")
        chain.data.rename(away)

        def bring_back() -> None:
            if away.exists():
                away.rename(chain.data)

        return bring_back
    return lambda: None


def clock_library(folder: Path) -> Path:
    """Build a library that adds to the clock what a file says, and reset that file."""
    library = folder / "clock.so"
    (folder / "clock").write_bytes(struct.pack("d", 0.0))
    if not library.exists():
        source = Path(__file__).with_name("chaos_clock.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
    return library


def expected_codes(launch: str, fault: str) -> set[int]:
    """Return the exit codes of what was started, see docs/training.md."""
    if "launcher" in fault:
        if launch == TORCHRUN and fault == "SIGTERM launcher":
            return {1}
        return {-9 if "SIGKILL" in fault else -15}
    if fault in STOPPING or fault in LASTING:
        stopped = 1 if launch == TORCHRUN else 85
        return {stopped, 1} if fault in PERHAPS_FAILING else {stopped}
    if fault in FAILING:
        return {1}
    return {ALONE: {-9}, SRUN: {-9, 1}, TORCHRUN: {1}, DEEPSPEED: {247, 1}}[launch]


def obey_permissions() -> None:
    """Drop the right of root to write into read-only folders, for the programs that follow."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def handles_signals(process: psutil.Process) -> bool:
    """Return whether a process handles SIGTERM itself."""
    with contextlib.suppress(FileNotFoundError):
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return True
