"""Atomic writes, checksums and syncing: a file has its old content or its new one, never half."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from pathlib import Path

# Environment variable that `--trust` sets, so that child processes see it too: pickles may run
# code when they are read.
TRUST = "MAE_SCALE_TRUST"


def host_label() -> str:
    """Return the name of this machine in a form that fits into a file name."""
    return re.sub("[^A-Za-z0-9]", "_", socket.gethostname())


def owner() -> str:
    """Return the part of a temporary file's name that says which process writes it."""
    return f"{host_label()}-{os.getpid()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, synced to disk before it is renamed."""
    temporary = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path from there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = sha256_of(path)
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Sync all files below a folder, and their names, to disk."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else _sync_file(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
