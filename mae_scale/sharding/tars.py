"""Walking through tars, by seeking in files or by reading streams from front to back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from mae_scale.data.remote import printable, shown
from mae_scale.data.tar import BLOCK
from mae_scale.errors import UserError
from mae_scale.files import open_file


class Header(tarfile.TarInfo):
    """A header that limits the size of long names and attributes, which tarfile reads whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        beside = (
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
        )  # fmt: skip
        if self.type in beside and self.size > _MOST_BESIDE:
            raise tarfile.InvalidHeaderError(  # type: ignore[attr-defined]
                "a name or an attribute is too long"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


_MOST_BESIDE = 1 << 20  # largest size of long names and attributes, in bytes

_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")  # gz bz2 xz zst zip


class Member(NamedTuple):
    """A file in a tar: its name, where its data begins and how long it is."""

    name: str
    offset: int
    size: int
    problem: str = ""  # why its bytes do not lie there, as for a link or sparse file


def walk_tar(
    path: Path, start: int = 0, end: int | None = None, inner: str = "", resync: bool = False
) -> Iterator[Member]:
    """Yield the files of a tar, or of a tar in bytes [start, end) of another, by seeking.

    Args:
        path: file with the tar.
        start, end: bytes of the tar in that file; None: up to its end.
        inner: name of the tar in the tar, for messages.
        resync: whether to search for the next header after a damaged one.

    Raises:
        UserError: the file is no tar, ends too early, or goes on behind the tar's end.
    """
    where = f"{path} ({inner})" if inner else str(path)
    try:
        with open_file(path) as stream:
            if end is None:
                end = os.fstat(stream.fileno()).st_size
            stream.seek(start)
            with tarfile.open(
                fileobj=stream, mode="r:", ignore_zeros=resync, tarinfo=Header
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all
                    problem = problem_of(member)
                    if not problem and member.offset_data + member.size > end:
                        raise UserError(f"{where} ends inside {member.name}: it is cut short")
                    if member.isfile() or problem:
                        yield Member(member.name, member.offset_data, member.size, problem)
                stream.seek(tar.offset)
                left = max(0, end - tar.offset)
                if wrong := _rest(stream, tar.offset, left, stream.read(min(BLOCK, left))):
                    raise UserError(f"{where} {wrong}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{where} is not an intact tar: {printable(str(error))}") from error


def problem_of(member: tarfile.TarInfo) -> str:
    """Return why the bytes of a file do not lie behind its header; empty if they do."""
    if member.islnk() or member.issym():
        return "it is a link"
    return "it is stored sparse" if member.issparse() else ""


def _rest(stream: Any, at: int, left: int | None, block: bytes) -> str | None:
    """Return what is wrong with the bytes behind the last member that was found; None if nothing.

    This is needed because tarfile takes a damaged header for the end, and stops at the first of
    several tars.

    Args:
        stream: stream that continues behind `block`.
        at: offset of `block`, the first one that is no member.
        left: number of bytes from there to the end; None: until the stream ends.
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


def lacks_end(path: Path, start: int = 0, end: int | None = None) -> bool:
    """Return whether a tar, or a tar in bytes [start, end) of a file, lacks its end marker."""
    with open_file(path) as stream:
        end = os.fstat(stream.fileno()).st_size if end is None else end
        size = min(BLOCK, end - start)
        stream.seek(end - size)
        return bool(stream.read(size).strip(b"\0"))


class Tail:
    """A stream that remembers the last megabytes that were read from it.

    Attributes:
        first: first bytes, which show whether it is compressed.
        has_end: whether `stream_tar` has found an end marker in it.
    """

    has_end = True
    first = b""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._before, self._last = b"", b""
        self.bytes = 0  # number of bytes read so far

    def read(self, size: int = -1) -> bytes:
        """Read from the stream."""
        data = self._stream.read(size)
        if data:
            self.first = self.first or data[:6]
            self._before, self._last = self._last, data
            self.bytes += len(data)
            self.passed(data)
        return data

    def passed(self, data: bytes) -> None:
        """Take note of bytes that have been read; a subclass may count or hash them."""

    def since(self, at: int) -> bytes:
        """Return the bytes that were read from offset `at` on, as far as they are remembered."""
        kept = self._before + self._last
        return kept[max(0, at - (self.bytes - len(kept))) :]


def stream_tar(stream: Tail, file: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the members of a tar that is read from front to back, to its very end.

    Raises:
        UserError: the stream is no tar, is compressed, ends too early, or goes on behind the tar.
    """
    where = shown(file)
    try:
        # tarfile handles the long names of GNU and pax; "r|" never seeks.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20, tarinfo=Header) as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []
                yield member, tar
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        packed = stream.first.startswith(_MAGIC)
        hint = "; it is compressed: unpack it, since images are read by their place"
        raise UserError(
            f"{where} is no intact tar ({printable(str(error))}){hint if packed else ''}"
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
