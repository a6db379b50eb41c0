"""Worker processes that always end: on an error, on a signal, and with their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import numpy as np

from mae_scale.errors import RunError
from mae_scale.launch.console import Progress
from mae_scale.launch.parent import when_parent_ends

Item = TypeVar("Item")
Result = TypeVar("Result")

SIGNALS = {signal.SIGINT, signal.SIGTERM}
_shared: Any = None


class WorkerKilled(RunError):
    """A worker process ended in the middle of its work."""


def shared() -> Any:
    """Return, in a worker, the value that the parent gave to `run_all`."""
    return _shared


def run_all(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    value: Any = None,
    counters: Any = None,
    total: int = 0,
    unit: str = "images",
) -> Generator[Result, None, None]:
    """Call `function` for each item in forked processes; yield results as they come; show progress.

    Leaving early, also by an exception such as a signal handler's, ends the processes at once. The
    pools of the standard library cannot do that: their threads wait for ever for a lock or for the
    rest of a message if a worker is killed, or a KeyboardInterrupt comes, at the wrong moment.

    Args:
        function: function to call in a worker process.
        items: arguments of the calls.
        workers: number of processes.
        value: value that `shared()` returns in the workers; it is not copied.
        counters: shared array of int64; its sum is the finished part of `total`.
        total: whole amount of work, in `unit`, for the display of progress.
        unit: name of the unit of `total`.

    Raises:
        WorkerKilled: a process ended without an answer.
    """
    items = list(items)
    waiting = iter(items)
    done = None if counters is None else np.frombuffer(counters, np.int64)
    pool: dict[Connection, ForkProcess] = {}
    with _signals_held_back() as handle_signals:
        try:
            _start(pool, min(workers, len(items)), function, value)
            busy = {connection for connection in pool if _give(connection, waiting)}
            with Progress(total, unit) as progress:
                while busy:
                    for connection in wait(list(busy), timeout=0.2):
                        assert isinstance(connection, Connection)
                        try:
                            result, error, trace = connection.recv()
                        except (EOFError, OSError) as gone:
                            why = "a worker process was killed (out of memory?)"
                            raise WorkerKilled(why) from gone
                        if error is not None:
                            raise error from RuntimeError(trace)
                        if not _give(connection, waiting):
                            busy.remove(connection)
                        yield result
                    handle_signals()
                    if done is not None:
                        progress.show(int(done.sum()))
        finally:
            for process in pool.values():
                process.kill()
            for connection, process in pool.items():
                process.join()
                connection.close()


@contextmanager
def _signals_held_back() -> Iterator[Callable[[], None]]:
    """Run the handlers of signals, which may raise, only when the yielded function is called.

    An exception anywhere else could leave behind a process that is just being started, and the
    interpreter would wait for it for ever at its own end. Blocking signals does not prevent this:
    another thread, such as one of OpenBLAS, receives them, and the handler still runs in this one.
    """
    arrived: list[signal.Signals] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def handle_signals() -> None:
        while arrived:
            number = arrived.pop(0)
            handler = handlers[number]
            assert callable(handler)
            handler(number, None)

    held = [number for number, handler in handlers.items() if callable(handler)]
    if threading.current_thread() is not threading.main_thread():
        held = []  # handlers run in the main thread only
    try:
        for number in held:
            signal.signal(number, lambda number, _: arrived.append(signal.Signals(number)))
        yield handle_signals
    finally:
        for number in held:
            signal.signal(number, handlers[number])
        handle_signals()


def _start(
    pool: dict[Connection, ForkProcess],
    workers: int,
    function: Callable[[Any], Any],
    value: Any,
) -> None:
    context = multiprocessing.get_context("fork")
    # A signal to all processes must not reach a process that is not yet set up.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for _ in range(max(1, workers)):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, os.getpid(), value))
            process.start()
            pool[mine] = process
            theirs.close()  # the pipe then ends when the process ends
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _give(connection: Connection, waiting: Iterator[Any]) -> bool:
    """Send the next item, if there is one."""
    for item in waiting:
        with suppress(BrokenPipeError):  # the process has ended, which is found when reading
            connection.send(item)
        return True
    return False


def _work(connection: Connection, function: Callable[[Any], Any], parent: int, value: Any) -> None:
    global _shared
    _shared = value
    # A terminal sends Ctrl-C to all processes, and Slurm SIGTERM; the parent decides about both.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _keep_freed_memory()
    when_parent_ends(lambda: os._exit(1), parent=parent)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None, str]
        try:
            answer = (function(item), None, "")
        except Exception as error:
            answer = (None, error, traceback.format_exc())
        connection.send(answer)


def _keep_freed_memory() -> None:
    """Make glibc reuse the buffers of images: getting new pages would take a fifth of the time."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((-3, 32 << 20), (-1, 256 << 20)):  # mmap and trim thresholds
            mallopt(option, size)
