"""A data-loading process: which signals it ignores, and when it ends."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time

import psutil

from mae_scale.launch.parent import when_parent_ends

GRACE_S = 2.0  # seconds for a worker to finish its batch when the loader is closed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class DataWorker:
    """Set-up of a worker, which ignores the signals that stop a run and ends by itself.

    The worker ends with its parent, in whatever way that ends. When the loader is closed it ends
    within seconds, even in the middle of a read that hangs.
    """

    def __init__(self, parent: int, stop: mmap.mmap) -> None:
        self._parent, self._stop = parent, stop

    def __call__(self, worker_id: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        when_parent_ends(_end, parent=self._parent)
        threading.Thread(target=self._end_when_closed, daemon=True).start()

    def _end_when_closed(self) -> None:
        while not self._stop[0]:
            time.sleep(0.5)
        time.sleep(GRACE_S)
        _end()


def _end() -> None:
    """End this worker and its children, which fetch shards."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)
