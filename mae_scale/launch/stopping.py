"""Stopping a run: a signal sets a flag, the training loop saves and the process exits with 85."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from mae_scale.errors import STOPPED
from mae_scale.launch.parent import when_parent_ends

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LAUNCHER_ENDED = "the end of the launcher"
TIME_IS_UP = "train.max_hours"
GRACE_S = 10


class StopRequest:
    """Remembers whether this process was asked to stop, and by what.

    Slurm, a launcher and a person may each send a signal, and often two of them do. Further signals
    change nothing, so that none can break the save that the first one asked for.
    """

    def __init__(self, reason: str | None = None) -> None:
        self._reason = reason
        self._ends_at: float | None = None  # on the monotonic clock

    @property
    def reason(self) -> str | None:
        """The first signal, `LAUNCHER_ENDED` or `TIME_IS_UP`; None while nothing asks to stop."""
        if self._reason is None and self._ends_at is not None and time.monotonic() > self._ends_at:
            self._reason = TIME_IS_UP
        return self._reason

    def set(self, reason: str) -> None:
        """Ask the run to stop. The first reason is kept."""
        if self._reason is None:
            self._reason = reason

    def after(self, hours: float) -> None:
        """Ask the run to stop when so many hours have passed from now on."""
        self._ends_at = time.monotonic() + hours * 3600

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; this is the handler that `signal.signal` is given."""
        self.set(signal.Signals(number).name)


def catch_signals_early() -> None:
    """Take over the signals of `SIGNALS` before the slow imports, and watch the launcher.

    The run that begins later learns of a signal that came before it. SIGHUP stays ignored under
    nohup. A launcher that is killed cannot pass a signal on, and its ranks would train on as
    orphans. The ranks of torchrun are its children; those of `deepspeed` are its grandchildren.
    """
    early = StopRequest()
    _set_handlers(early)
    if "TORCHELASTIC_RUN_ID" not in os.environ and "CROSS_SIZE" not in os.environ:
        return

    def launcher_ended() -> None:
        current = _installed() or early
        current.set(LAUNCHER_ENDED)
        os.kill(os.getpid(), signal.SIGTERM)  # also wakes a main thread that waits for others

    grandparent = None
    if "CROSS_SIZE" in os.environ:  # the launcher `deepspeed` starts its launch.py, that the ranks
        grandparent = psutil.Process(os.getppid()).ppid()
    when_parent_ends(launcher_ended, grandparent=grandparent)


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Give one run a stop request of its own, and put the handlers back when the run is over.

    A signal that came before the run, to `catch_signals_early`, counts for it. Outside of the main
    thread, where Python allows no handlers, the request can be set by others only.
    """
    early = _installed()
    request = StopRequest(early.reason if early else None)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = _set_handlers(request)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_handlers(request: StopRequest) -> dict[signal.Signals, signal.Handlers]:
    """Install the handlers; gives those that were there before."""
    before = {}
    for number in SIGNALS:
        old = signal.getsignal(number)
        if number == signal.SIGHUP and old == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, request.handle)
    return before  # type: ignore[return-value]


def _installed() -> StopRequest | None:
    """The stop request that gets SIGTERM at present."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, StopRequest) else None


@contextmanager
def waiting_for_others(stop: StopRequest | None) -> Iterator[None]:
    """Let a signal end the process while the main thread waits inside C++ for other ranks.

    There Python's handlers do not run, and the ranks may never come. If the wait does not end in
    `GRACE_S` seconds the process exits with 85: nothing has begun, so nothing is lost.

    Args:
        stop: may have been set before the wait begins.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has no wake-up file descriptor for other threads
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # written by the handler in C
            if number[0] in SIGNALS and not over.wait(GRACE_S):
                os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if stop is not None and stop.reason:
        writer.send(bytes([signal.SIGTERM]))
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        writer.close()
