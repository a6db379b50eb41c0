"""Walking through tars, by seeking in files and by reading streams from front to back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from mae_scale.data.remote import printable, shown
from mae_scale.data.tar import BLOCK
from mae_scale.errors import UserError


class Member(NamedTuple):
    """A file in a tar: its name, where its data begins and how long it is."""

    name: str
    offset: int
    size: int


def walk_tar(
    path: Path, start: int = 0, end: int | None = None, inner: str = "", resync: bool = False
) -> Iterator[Member]:
    """Yield the files of a tar, or of a tar in bytes [start, end) of another, by seeking.

    Args:
        inner: name of the tar in the tar, for messages.
        resync: search on for the next header after a damaged one.

    Raises:
        UserError: it is no tar, it ends too early, or something stands behind its end.
    """
    where = f"{path} ({inner})" if inner else str(path)
    try:
        with path.open("rb") as stream:
            if end is None:
                end = os.fstat(stream.fileno()).st_size
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=resync) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if member.offset_data + member.size > end:
                        raise UserError(f"{where} ends inside {member.name}: it is cut short")
                    if member.isfile():
                        yield Member(member.name, member.offset_data, member.size)
                stream.seek(tar.offset)
                left = max(0, end - tar.offset)
                if problem := _rest(stream, tar.offset, left, stream.read(min(BLOCK, left))):
                    raise UserError(f"{where} {problem}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{where} is not an intact tar: {printable(str(error))}") from error


def _rest(stream: Any, at: int, left: int | None, block: bytes) -> str | None:
    """Say what is wrong with the bytes behind the last member that was found; None: nothing.

    tarfile takes a damaged header for the end, and stops at the first of several tars.

    Args:
        stream: stream that continues behind `block`.
        at: byte at which `block`, the first one that is no member, begins.
        left: bytes from there to the end; None: until the stream ends.
    """
    if block.strip(b"\0"):
        return f"has a damaged header at byte {at:,}"
    at += len(block)
    left = None if left is None else left - len(block)
    while data := stream.read(1 << 20 if left is None else min(1 << 20, left)):
        if rest := data.lstrip(b"\0"):
            place = at + len(data) - len(rest)
            return (
                f"goes on at byte {place:,}, behind the end of its archive; if several tars were "
                "joined, split them, or write them anew with `tar -i`"
            )
        at += len(data)
        left = None if left is None else left - len(data)
    return None


class Tail:
    """A stream that remembers the last megabytes that were read from it.

    Attributes:
        has_end: whether `stream_tar` has found an end marker in it.
    """

    has_end = True

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._before, self._last = b"", b""
        self.bytes = 0  # number of bytes read so far

    def read(self, size: int = -1) -> bytes:
        """Read from the stream."""
        data = self._stream.read(size)
        if data:
            self._before, self._last = self._last, data
            self.bytes += len(data)
            self.passed(data)
        return data

    def passed(self, data: bytes) -> None:
        """Take note of bytes that have been read; a subclass may count or hash them."""

    def since(self, at: int) -> bytes:
        """Return the bytes that were read from byte `at` on, as far as they are remembered."""
        kept = self._before + self._last
        return kept[max(0, at - (self.bytes - len(kept))) :]


def stream_tar(stream: Tail, file: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the members of a tar that is read from front to back, to its very end.

    Raises:
        UserError: it is no tar, is compressed, ends too early, or goes on behind its end.
    """
    where = shown(file)
    try:
        # tarfile knows the long names of GNU and pax; "r|" never seeks.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []
                yield member, tar
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where} is no intact tar ({printable(str(error))}); compressed tars must be "
            "unpacked, since images are read by their place"
        ) from error
    kept = stream.since(end)
    problem = _rest(_Joined(kept[BLOCK:], stream), end, None, kept[:BLOCK])
    if problem:
        raise UserError(f"{where} {problem}")
    stream.has_end = bool(kept)


class _Joined:
    """A stream that begins with some bytes and goes on with another stream."""

    def __init__(self, first: bytes, then: Tail) -> None:
        self._first, self._then = first, then

    def read(self, size: int = -1) -> bytes:
        first, self._first = self._first, b""
        return first or self._then.read(size)
