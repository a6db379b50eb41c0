"""Worker processes that end when they should: on an error, on a signal, with their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from mae_scale.data.console import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

SIGNALS = {signal.SIGINT, signal.SIGTERM}
_shared: Any = None


def shared() -> Any:
    """What the parent gave to `process_pool`, in a worker."""
    return _shared


def _start(parent: int, value: Any) -> None:
    global _shared
    _shared = value
    # A terminal sends Ctrl-C to all processes, and Slurm SIGTERM; the parent decides about both.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _keep_freed_memory() -> None:
    """Have glibc reuse the buffers of images: getting pages anew takes a fifth of the time."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((-3, 32 << 20), (-1, 256 << 20)):  # mmap and trim thresholds
            mallopt(option, size)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


@contextmanager
def process_pool(workers: int, value: Any = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes in which `shared()` gives `value`, without copying it.

    Leaving with an exception, such as that of a signal handler, ends them at once.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        max(1, workers), multiprocessing.get_context("fork"), _start, (os.getpid(), value)
    )
    # Processes start with the first task. A signal must not reach one that is not yet set up.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def run_all(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    value: Any,
    counters: Any,
    total: int,
    unit: str = "images",
) -> Generator[Result, None, None]:
    """Call `function` for each item in a pool; results as they come, and progress shown.

    Args:
        value: what `shared()` gives in the workers.
        counters: shared array of int64; its sum is what is done of `total`, in `unit`.
    """
    items = list(items)
    if not items:
        return
    done = np.frombuffer(counters, np.int64)
    with process_pool(min(workers, len(items)), value) as pool, Progress(total, unit) as progress:
        running = {pool.submit(function, item) for item in items}
        while running:
            ready, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
            progress.show(int(done.sum()))
