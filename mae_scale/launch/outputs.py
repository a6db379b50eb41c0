"""Standard output and error as a long run needs them: what cannot be written is dropped.

A log is not worth a run. The reader of a pipe may have gone (Ctrl-C ends `tee`, too), the terminal
may have been closed, the disk with the log may be full, or the shell may have closed the
descriptor. Whatever writes, such as print, a logging handler, a progress bar, a traceback or the
interpreter at its end, must neither fail nor wait for ever because of it.
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

PATIENCE_S = 5.0  # for a pipe or terminal whose reader does not read, before text is dropped
PIECE = 4096  # bytes that a pipe takes whole once it is writable (PIPE_BUF)

# Line feeds, tabs, carriage returns, and the few sequences that tqdm and `status` use are kept.
# Text from outside, such as the name of a file, must not move the cursor or rename the window.
OWN = r"\x1b\[(?:A|H\x1b\[2J|0m|3[123]m)"
UNWANTED = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
CONTROL = re.compile(rf"({OWN})|[{UNWANTED}]")


def one_line(text: object) -> str:
    """Return a text for a message, in which control characters and line ends are escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def printable(text: str) -> str:
    """Return a text of several lines, in which what would move the cursor is an escape."""
    return CONTROL.sub(lambda match: match[1] or _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def say_at_once(line: str) -> None:
    """Write a line to descriptor 2 from a signal handler: without a buffer, a lock or a wait."""
    with suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            start = "\n" if os.isatty(2) else ""  # a progress bar may stand there
            os.write(2, f"{start}{one_line(line)}\n".encode(errors="backslashreplace"))


class Descriptor(io.RawIOBase):
    """The standard output or error of this process.

    Args:
        number: number of the descriptor.
        drops: whether text that cannot be written is dropped; otherwise it raises an `OSError`.
            Text is also dropped while the reader of a pipe or terminal does not read, once it has
            not read for `PATIENCE_S` seconds.
    """

    def __init__(self, number: int, drops: bool) -> None:
        self._number, self.drops = number, drops
        mode = os.fstat(number).st_mode
        self._waits = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)
        self._stuck = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: object) -> int:
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(rest)
        try:
            while rest:
                if not self._is_ready():
                    break
                piece = rest[:PIECE] if self._waits else rest
                try:
                    rest = rest[os.write(self._number, piece) :]
                except BlockingIOError:  # somebody who shares it made it non-blocking
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
    """A stream of text for people: it prints any name in any locale, and moves no cursor."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def take_over(drops: bool = True) -> None:
    """Replace `sys.stdout` and `sys.stderr`, before anything else keeps a reference to them.

    Descriptors that the shell has closed lead to /dev/null from now on: else the next file that
    is opened, such as a checkpoint, would get the number and the output.

    Args:
        drops: whether text that stdout cannot take is dropped. Otherwise it raises, which a
            command needs whose product is what it prints. What stderr cannot take is always
            dropped.
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
            continue  # a test or a notebook has put its own there
        # Not buffered a second time: a forked process must not inherit text or a lock.
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
