"""Disks that are full or read-only: file systems of their own where these are allowed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _mount(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """Yield a folder without room; where nothing can be mounted, the size of files is limited."""
    if _mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        with suppress(OSError), (folder / "other").open("wb") as stream:
            stream.write(bytes(1 << 20))
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def read_only_disk(folder: Path) -> Iterator[Path]:
    """Yield a folder that nobody can write; without mounts, one without permissions, or /sys."""
    if _mount(folder, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    elif os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    else:  # root in a container, where /sys is read-only
        yield Path("/sys")
