"""Stopping a run: a signal sets a flag, the training loop saves, and the process exits with 85."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from mae_scale.errors import STOPPED
from mae_scale.launch.outputs import say_at_once
from mae_scale.launch.parent import when_parent_ends

# SIGTERM is the last one: where it is handled, the others are, too.
SIGNALS = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGTERM,
)
LAUNCHER_ENDED = "the end of the launcher"
TIME_IS_UP = "train.max_hours"
GRACE_S = 10  # longest wait for other ranks after a signal


class StopRequest:
    """Remembers whether this process was asked to stop, and by what.

    Slurm, a launcher and a person may each send a signal, and often two of them do. Further signals
    change nothing, so that none can break the save that the first one asked for. Ctrl-C (SIGINT)
    gets an answer at once, on rank 0.

    Args:
        reason: reason of a request that came before; None: there was none.
        is_early: whether no run has begun, so that Ctrl-C may end a process that is alone at once.

    Attributes:
        doing: function that returns what this rank does and for how many seconds it has done so;
            None: no run has begun.
        step_seconds: duration of the last step; None before the end of the first one.
    """

    def __init__(self, reason: str | None = None, *, is_early: bool = False) -> None:
        self._reason, self._is_early = reason, is_early
        self._presses = 0  # number of times that Ctrl-C was pressed
        self.doing: Callable[[], tuple[str, float]] | None = None
        self.step_seconds: float | None = None
        self._ends_at: float | None = None  # on the monotonic clock

    @property
    def reason(self) -> str | None:
        """Name of the first signal, `LAUNCHER_ENDED` or `TIME_IS_UP`; None without a request."""
        if self._reason is None and self._ends_at is not None and time.monotonic() > self._ends_at:
            self._reason = TIME_IS_UP
        return self._reason

    def set(self, reason: str) -> None:
        """Ask the run to stop. The first reason is kept."""
        if self._reason is None:
            self._reason = reason

    def after(self, hours: float) -> None:
        """Ask the run to stop `hours` hours from now."""
        self._ends_at = time.monotonic() + hours * 3600

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; this is the handler that `signal.signal` is given."""
        self.set(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._presses += 1
            if self._is_early and _is_alone():
                say_at_once("mae-scale: stopped before the run began; the same command starts it")
                os._exit(STOPPED)
            if _is_first_rank():
                say_at_once(f"mae-scale: {self.answer()}")

    def answer(self) -> str:
        """Return the answer to Ctrl-C: what is done before the end, and for how long so far."""
        again = "press again to see how long"
        if self.doing is None:
            return f"stopping once all processes are there; {again}"
        what, seconds = self.doing()
        if self._presses > 1:
            usual = "" if self.step_seconds is None else f"; a step takes {self.step_seconds:.1f} s"
            return f"stopping: {what} for {seconds:.0f} s{usual}; then it is saved"
        if what.startswith(("computing", "waiting for the data")):
            return f"stopping after this step; {again}"
        return f"stopping after {what}; {again}"


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _is_alone() -> bool:
    return not {"RANK", "SLURM_PROCID"} & os.environ.keys()


def catch_signals_early() -> None:
    """Take over the signals of `SIGNALS` before the slow imports, and watch the launcher.

    The run that begins later learns of a signal that came before it; but Ctrl-C ends a process that
    is alone, since nothing has begun. SIGHUP stays ignored under nohup. The launcher is watched
    because one that is killed cannot pass a signal on, and its ranks would train on as orphans. The
    ranks of torchrun are its children; those of `deepspeed` are its grandchildren.
    """
    early = StopRequest(is_early=True)
    _set_handlers(early)
    if "TORCHELASTIC_RUN_ID" not in os.environ and "CROSS_SIZE" not in os.environ:
        return

    def launcher_ended() -> None:
        current = _installed() or early
        current.set(LAUNCHER_ENDED)
        os.kill(os.getpid(), signal.SIGTERM)  # also wakes a main thread that waits for others

    grandparent = None
    if "CROSS_SIZE" in os.environ:  # `deepspeed` starts its launch.py, which starts the ranks
        grandparent = psutil.Process(os.getppid()).ppid()
    when_parent_ends(launcher_ended, grandparent=grandparent)


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Give one run a stop request of its own, and put the handlers back when the run is over.

    A signal that `catch_signals_early` took before the run counts for the run. Outside of the main
    thread Python allows no handlers; there only other code can set the request.

    Yields:
        The stop request of the run.
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
    """Install the handlers of a request, and return the previous ones."""
    before = {}
    for number in SIGNALS:
        old = signal.getsignal(number)
        if number == signal.SIGHUP and old == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, request.handle)
    return before  # type: ignore[return-value]


def _installed() -> StopRequest | None:
    """Return the stop request that handles SIGTERM at present; None if there is none."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, StopRequest) else None


@contextmanager
def waiting_for_others(stop: StopRequest | None) -> Iterator[None]:
    """Let a signal end the process while the main thread waits inside C++ for other ranks.

    Python's handlers do not run during that wait, and the other ranks may never come. If the wait
    does not end within `GRACE_S` seconds after a signal, the process exits with 85: nothing has
    begun, so nothing is lost.

    Args:
        stop: request that may have been set before the wait begins; it counts as a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has no wake-up file descriptor for other threads
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # Python's handler in C writes the signal's number
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


def leave_before_start() -> dict[int, signal.Handlers]:
    """Let Ctrl-C and SIGTERM end the process at once, with exit code 85, while no run has begun.

    Returns:
        The previous handlers, by the number of the signal.
    """

    def leave(*_: object) -> None:
        say_at_once("stopped; the same command starts again")
        os._exit(STOPPED)

    return {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}  # type: ignore[misc]
