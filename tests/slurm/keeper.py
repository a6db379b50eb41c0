"""Run a daemon so that none of its processes outlives the program that started this one.

`python keeper.py COMMAND …` adopts all that COMMAND starts, daemons of its own included, and kills
them when its standard input closes, which happens however its starter ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys
import time
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36


def reap() -> None:
    """Collect the children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_all() -> None:
    """Kill every descendant, until none is left."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.02)
        reap()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        reap()
    kill_all()


if __name__ == "__main__":
    main()
