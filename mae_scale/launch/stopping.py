"""Being stopped: signals raise a flag, the loop saves and exits with 85."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

STOPPED = 85  # exit code: stopped early, start me again (the number of ERESTART)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
GRACE_S = 10


class StopRequest:
    """Remembers why the run is to stop: a signal, or a launcher that has died.

    Slurm, a launcher and a person may each send a signal, and often two of them do: more signals
    change nothing, so that none can break the save that the first one asked for.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._parent: psutil.Process | None = None  # DeepSpeed's launch.py, child of `deepspeed`
        self._launcher = 0  # process id of `deepspeed`

    def install(self) -> None:
        """Take over SIGTERM, SIGUSR1, SIGINT and, unless under nohup, SIGHUP; watch the launcher.

        A launcher that is killed cannot pass a signal on, and its ranks would train on as orphans.
        torchrun's ranks are its children; those of `deepspeed` are its grandchildren.
        """
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)
        if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if "CROSS_SIZE" in os.environ:
            self._parent = psutil.Process(os.getppid())
            self._launcher = self._parent.ppid()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.set(signal.Signals(number).name)

    def set(self, reason: str) -> None:
        """Ask the run to stop; the first reason counts."""
        if self._reason is None:
            self._reason = reason

    @property
    def reason(self) -> str | None:
        """The name of the first signal, "the end of the launcher", or None: train on."""
        if self._reason is None and self._parent is not None and self._is_orphan(self._parent):
            self._reason = "the end of the launcher"
        return self._reason

    def _is_orphan(self, parent: psutil.Process) -> bool:
        try:
            return parent.ppid() != self._launcher
        except psutil.NoSuchProcess:
            return True


stop_request = StopRequest()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Let a signal end the process while the main thread waits inside C++ for other ranks.

    There Python's handlers do not run, and the ranks may never come. If the wait does not end in
    `GRACE_S` seconds the process exits with 85: nothing has begun, so nothing is lost.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # written by the handler in C
            if number[0] in SIGNALS and not over.wait(GRACE_S):
                os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if stop_request.reason:
        writer.send(bytes([signal.SIGTERM]))
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        writer.close()
