"""Remote shards, staged whole into a folder of limited size on a local disk.

A shard is fetched once, however many processes of a node need it: they agree through file locks,
so they need not know each other. A shard is in the folder whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from mae_scale.data.remote import open_remote, shown
from mae_scale.errors import UserError
from mae_scale.files import Digest, create_file, open_descriptor

_TRIES = 5
_WAIT_S = 1.0  # wait before the second try; it doubles after each
_STALL_S = 60.0  # a transfer that brings no byte for this time is given up
_CHUNK = 1 << 20
_ROOM_POLL_S = 0.2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FetchError(OSError):
    """A remote file could not be fetched, after several tries; the message names it."""


class ShardCache:
    """A folder with copies of remote shards; when it is full, the least recently used is removed.

    Args:
        folder: folder on a local disk, which is made if it does not exist. Runs may share it.
        max_bytes: largest size of all copies together, in bytes; None: no limit.
        version: fingerprint of the dataset; copies of another version are not used.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None, version: str = "") -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._version = version
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / "room.lock"):
                pass
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be written: {error.strerror}; "
                "give another one (cache_dir)"
            ) from None

    def open(self, url: str, size: int, sha256: str | None = None) -> int:
        """Open the local copy of a shard for reading, and fetch the shard first if there is none.

        The returned descriptor stays valid when the copy is removed.

        Args:
            url: address of the shard, as `open_remote` takes it.
            size: size of the shard in bytes.
            sha256: SHA-256 of the shard; None accepts any content of that size.

        Raises:
            UserError: the shard is larger than the folder may be.
            FetchError: the shard could not be fetched after several tries, or has other content.
        """
        if self._max_bytes is not None and size > self._max_bytes:
            raise UserError(
                f"{shown(url)} has {size:,} bytes and does not fit into {self._folder}, "
                f"which may take {self._max_bytes:,}; raise the limit"
            )
        path = self._folder / f"{_digest(self._version, url)}.tar"
        with suppress(FileNotFoundError):
            return self._open_copy(path)
        with _locked(path.with_suffix(".lock")):
            with suppress(FileNotFoundError):  # another process has fetched it meanwhile
                return self._open_copy(path)
            part = path.with_suffix(".part")
            try:
                try:
                    with create_file(part) as stream:
                        self._make_room(part, size)
                        _with_retries(url, lambda: _download(url, stream, size, sha256))
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        raise
                    raise FetchError(
                        f"{shown(url)} ({size:,} bytes) does not fit into the cache folder "
                        f"{self._folder}: {error.strerror}; give another one (cache_dir), or "
                        "limit it (cache_gb)"
                    ) from None
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                part.rename(path)
                return descriptor
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def used(self, descriptor: int) -> None:
        """Note that a copy is in use, so that it is not the next to be removed."""
        with suppress(OSError):  # another user may own the copy
            os.utime(descriptor)

    def _open_copy(self, path: Path) -> int:
        descriptor = open_descriptor(path)
        self.used(descriptor)
        return descriptor

    def _make_room(self, part: Path, size: int) -> None:
        """Wait until `part` may grow to `size`, and reserve that room."""
        while True:
            with _locked(self._folder / "room.lock"):
                if self._max_bytes is None or self._evict(self._max_bytes - size, part):
                    os.truncate(part, size)  # from now on these bytes count
                    return
            time.sleep(_ROOM_POLL_S)  # other processes fetch now; their copies can be removed later

    def _evict(self, limit: int, part: Path) -> bool:
        """Remove the least recently used copies; return whether the rest takes at most `limit`."""
        used, copies = 0, []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".part" and path != part:
                    if not _remove_abandoned(path):
                        used += path.stat().st_size
                elif path.suffix == ".tar":
                    stat = path.stat()
                    used += stat.st_size
                    copies.append((stat.st_mtime_ns, stat.st_size, path))
        for _, size, path in sorted(copies):
            if used <= limit:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used <= limit


def read_remote(url: str) -> bytes:
    """Return the content of a small remote file.

    Raises:
        FetchError: it could not be fetched after several tries.
    """
    return _with_retries(url, lambda: b"".join(_chunks(url)))


def _with_retries(url: str, attempt: Callable[[], Any]) -> Any:
    for number in range(_TRIES):
        try:
            return attempt()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            if number + 1 == _TRIES:
                raise FetchError(
                    f"{shown(url)} cannot be fetched ({_TRIES} tries): {error}"
                ) from None
            time.sleep(_WAIT_S * 2**number)


def _download(url: str, stream: Any, size: int, sha256: str | None) -> None:
    stream.seek(0)
    digest = Digest()
    for chunk in _chunks(url):
        digest.update(chunk)
        if digest.bytes > size:
            break
        stream.write(chunk)
    stream.flush()
    got = digest.bytes
    if got != size:
        raise OSError(f"{'more than ' if got > size else ''}{min(got, size)} bytes came of {size}")
    if sha256 not in (None, digest.sha256):
        raise OSError("it has another SHA-256 than when it was indexed")


def _chunks(url: str) -> Iterator[bytes]:
    """Yield the content of a URL in parts; raise an OSError when the transfer fails or stalls."""
    source = open_remote(url)
    process: subprocess.Popen[bytes] = source.proc
    pipe = source.stream.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    try:
        while True:
            if not poll.poll(_STALL_S * 1000):
                raise TimeoutError(f"nothing came for {_STALL_S:g} s")
            chunk = os.read(pipe, _CHUNK)
            if not chunk:
                break
            yield chunk
        status = process.wait(_STALL_S)
        if status:
            raise OSError(f"the transfer failed with status {status}")
    except subprocess.TimeoutExpired as error:
        raise TimeoutError("the transfer does not end") from error
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()
        source.stream.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; it is freed when the process ends, in whatever way."""
    with _lock_file(path) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _lock_file(path: Path) -> BinaryIO:
    return os.fdopen(open_descriptor(path, os.O_WRONLY | os.O_CREAT), "wb")


def _remove_abandoned(part: Path) -> bool:
    """Remove the partial copy of an ended process; return False if its process still works."""
    with _lock_file(part.with_suffix(".lock")) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
        return True


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
