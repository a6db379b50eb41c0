"""Ending this process together with the process that started it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import psutil


def when_parent_ends(
    action: Callable[[], None], *, parent: int | None = None, grandparent: int | None = None
) -> None:
    """Call `action` in a thread of its own as soon as the parent process is gone, however it ended.

    The kernel gives an orphan to another parent, so the thread only compares process ids. Unlike
    `PR_SET_PDEATHSIG` this does not depend on which thread of the parent started the process.

    Args:
        action: function to call; it runs in a daemon thread.
        parent: process id of the parent; None means the present parent. A forked process should
            be given it, since the parent may end before this call.
        grandparent: process id of the parent's parent, if the end of that process counts, too.
    """
    expected = os.getppid() if parent is None else parent

    def watch() -> None:
        while not _is_orphan(expected, grandparent):
            time.sleep(0.2)
        action()

    threading.Thread(target=watch, daemon=True).start()


def _is_orphan(parent: int, grandparent: int | None) -> bool:
    if os.getppid() != parent:
        return True
    try:
        return grandparent is not None and psutil.Process(parent).ppid() != grandparent
    except psutil.NoSuchProcess:
        return True
