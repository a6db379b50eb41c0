"""Standard output and error for a long run: text that cannot be written is dropped.

A run must not end because of its log. The reader of a pipe may have gone (Ctrl-C ends `tee`, too),
the terminal may have been closed, the disk with the log may be full, or the shell may have closed
the descriptor. Code that writes, such as print, a logging handler, a progress bar, a traceback or
the interpreter at its end, must neither fail nor wait for ever because of that.
"""

from __future__ import annotations

import io
import os
import re
import select
import stat
import sys
import time
from contextlib import suppress

PATIENCE_S = 5.0  # longest wait for a reader of a pipe or terminal, before text is dropped
PIECE = 4096  # number of bytes that a writable pipe takes at once (PIPE_BUF)

# Line feeds, tabs, carriage returns, and the few sequences that tqdm and `status` use are kept. All
# else is escaped: text such as a file's name must not move the cursor or rename the window.
OWN = r"\x1b\[(?:A|H\x1b\[2J|0m|3[123]m)"
UNWANTED = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
MOST_LETTERS = 2000  # of a line
CONTROL = re.compile(rf"({OWN})|[{UNWANTED}]")


def one_line(text: object) -> str:
    """Return a text for a message, with control characters and line ends escaped.

    The middle of a text that would fill a screen is left out: it may quote a file of anybody.
    """
    line = "".join(c if c.isprintable() else _escape(c) for c in str(text))
    if len(line) <= MOST_LETTERS:
        return line
    start, end = line[: MOST_LETTERS * 2 // 3], line[-(MOST_LETTERS // 4) :]
    return f"{start} [{len(line) - len(start) - len(end):,} letters are left out here] {end}"


def printable(text: str) -> str:
    """Return a text of several lines, with everything escaped that would move the cursor."""
    return CONTROL.sub(lambda match: match[1] or _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def say_at_once(line: str) -> None:
    """Write a line to descriptor 2 from a signal handler: without a buffer, a lock or a wait."""
    with suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            start = "\n" if os.isatty(2) else ""  # a progress bar may be on this line
            os.write(2, f"{start}{one_line(line)}\n".encode(errors="backslashreplace"))


class Descriptor(io.RawIOBase):
    """The standard output or error of this process.

    Args:
        number: number of the descriptor.
        drops: whether text that cannot be written is dropped; otherwise writing it raises an
            `OSError`. Text is also dropped once the reader of a pipe or terminal has not read for
            `PATIENCE_S` seconds, until it reads again.
    """

    def __init__(self, number: int, drops: bool) -> None:
        self._number, self.drops = number, drops
        mode = os.fstat(number).st_mode
        self._waits = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)
        self._stuck = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the number of the descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._number)

    def write(self, data: object) -> int:
        """Write bytes or drop them; return their number in both cases."""
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(rest)
        try:
            while rest:
                if not self._is_ready():
                    break
                piece = rest[:PIECE] if self._waits else rest
                try:
                    rest = rest[os.write(self._number, piece) :]
                except BlockingIOError:  # a process that shares it has made it non-blocking
                    time.sleep(0.01)
        except OSError:
            if not self.drops:
                raise
        return size

    def _is_ready(self) -> bool:
        if not self._waits:
            return True
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        limit = None if not self.drops else 0 if self._stuck else PATIENCE_S * 1000
        self._stuck = not poll.poll(limit)
        return not self._stuck


class Output(io.TextIOWrapper):
    """A stream of text that prints any name in any locale, and lets no text move the cursor."""

    def write(self, text: str) -> int:
        """Write a text, escaped by `printable`; return its length."""
        super().write(printable(text))
        return len(text)


def take_over(drops: bool = True) -> None:
    """Replace `sys.stdout` and `sys.stderr`, before anything else keeps a reference to them.

    Descriptors that the shell has closed lead to /dev/null from now on. Otherwise the next file
    that is opened, such as a checkpoint, would get the number and so the output.

    Args:
        drops: whether text that stdout cannot take is dropped. Otherwise writing it raises an
            error, as a command needs whose product is what it prints. Text that stderr cannot take
            is always dropped.
    """
    for number in (0, 1, 2):  # first of all: a file opened below must not get one of them
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if isinstance(before, Output):
            before.buffer.drops = drops or number == 2  # type: ignore[attr-defined]
            continue
        if before is not None and not _is_descriptor(before, number):
            continue  # a test or a notebook has put its own stream there
        # There is no second buffer: a forked process must not inherit its text or its lock.
        output = Output(
            Descriptor(number, drops or number == 2),  # type: ignore[arg-type]
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, output)
        setattr(sys, f"__{name}__", output)


def _is_descriptor(file: object, number: int) -> bool:
    try:
        return file.fileno() == number  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
