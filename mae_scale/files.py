"""Atomic writes, checksums and syncing: a file has its old content or its new one, never half."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class Trust(NamedTuple):
    """Something that the program does for the files of others only if the user allows it.

    Every command takes the option. It sets the environment variable, which child processes see.
    """

    option: str
    variable: str
    meaning: str  # continues "OPTION lets ..."

    def given(self) -> bool:
        """Return whether the user has allowed it."""
        return os.environ.get(self.variable) == "1"


TRUST_PICKLE = Trust(
    "--trust-pickle", "MAE_SCALE_TRUST_PICKLE", "checkpoints and weights run the code they ask for"
)
TRUST_INDEX = Trust(
    "--trust-index", "MAE_SCALE_TRUST_INDEX", "a manifest name commands and addresses"
)


def host_label() -> str:
    """Return the name of this machine in a form that fits into a file name."""
    return re.sub("[^A-Za-z0-9]", "_", socket.gethostname())


def owner() -> str:
    """Return the part of a temporary file's name that says which process writes it."""
    return f"{host_label()}-{os.getpid()}"


def is_utf8(path: str | Path) -> bool:
    """Say whether a path is UTF-8. On Linux it may be any bytes, but PyTorch opens no others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_utf8(text: str) -> bytes:
    """Return a text as UTF-8, with an escape such as ``\\udcff`` for each surrogate.

    Names of files and strings in JSON may hold surrogates, which UTF-8 does not have.
    """
    return text.encode(errors="backslashreplace")


class NotAFile(OSError):
    """A path leads to a folder, a named pipe, a socket or a device instead of a file."""


def require_file(path: str | Path) -> None:
    """Check that a path leads to a regular file, before a library opens it.

    Opening a named pipe would wait for a writer that never comes, and opening a device can act on
    it. Folders of others may hold either.

    Raises:
        OSError: the path leads to nothing, or to something other than a regular file.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_ISDIR: "a folder",
            stat.S_ISFIFO: "a named pipe",
            stat.S_ISSOCK: "a socket",
        }
        kind = next((name for test, name in kinds.items() if test(mode)), "a device")
        raise NotAFile(errno.EINVAL, f"it is {kind}, not a file", str(path))


def open_descriptor(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without waiting, and return its descriptor.

    A file is never opened for writing through a link, which may lead to a file of the user.

    Args:
        flags: flags of `os.open`. With O_CREAT the file need not exist.

    Raises:
        OSError: the file cannot be opened, is no regular file, or is a link and to be written.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        refuse_link(path)
        flags |= os.O_NOFOLLOW
    try:
        require_file(path)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def refuse_link(path: str | Path) -> None:
    """Refuse to write a file in whose place there is a link.

    Raises:
        OSError: the path is a link.
    """
    if os.path.islink(path):  # noqa: PTH114
        raise OSError(errno.ELOOP, "it is a link, which is not written through", str(path))


def create_file(path: str | Path) -> BinaryIO:
    """Open a regular file for writing its bytes from the beginning.

    Raises:
        OSError: the file cannot be opened, is no regular file, or is a link.
    """
    return os.fdopen(open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading its bytes.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
    """
    return os.fdopen(open_descriptor(path), "rb")


def read_file(path: str | Path, most: int = 1 << 30) -> bytes:
    """Read a regular file whole.

    Args:
        most: largest number of bytes that the file may have.

    Raises:
        OSError: the file cannot be read, is no regular file, or has more bytes.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, which is synced to disk, then renamed.

    Text is written as `as_utf8` gives it.

    Raises:
        OSError: the file cannot be written, or is a link.
    """
    if isinstance(content, str):
        content = as_utf8(content)
    refuse_link(path)
    temporary = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        with create_file(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that it holds; of a link only the link, never what it leads to."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path relative to the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = sha256_of(path)
    return found


class Digest:
    """SHA-256 and length in bytes of a stream that is taken in piece by piece."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0

    def update(self, data: Any) -> None:
        """Take in the next piece of the stream: any object with a buffer."""
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes

    @property
    def sha256(self) -> str:
        """SHA-256 of all pieces so far, in hexadecimal digits."""
        return self._hash.hexdigest()


def digest_of(path: Path) -> Digest:
    """Read a file and return the digest of its content."""
    digest = Digest()
    with open_file(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return digest_of(path).sha256


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
