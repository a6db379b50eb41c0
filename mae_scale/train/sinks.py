"""Files to which the rows of a record go. A run goes on when one of them cannot be written."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mae_scale.files import open_descriptor, write_atomically
from mae_scale.train.records import readable_rows

log = logging.getLogger("mae_scale")


class Rows:
    """A file of rows, one JSON object per line, without a gap or a repeat after a resume.

    Rows that cannot be written (a full disk, a quota, no permission) stay in memory. They are
    tried again with each row and before each save, so that the record is whole once there is room.
    A save does not wait for them: weights are worth more than rows. Only a process that ends
    before there is room loses them, and says which. Where somebody removes or replaces the file,
    a warning says so, and later rows are added to the file that is there then.

    Args:
        path: path of the file.
        step: number of optimiser steps done so far. Rows of later steps are removed, since those
            steps will be done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for row in readable_rows(path, whole=True):
            if row["step"] <= step:
                rows.setdefault(row["step"], row)  # of two rows of a step readers take the first
        write_atomically(path, "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
        self._path = path
        self._file = self._open()
        self._waiting: list[tuple[int, bytes]] = []
        self._said = False

    def _open(self) -> int:
        return open_descriptor(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it is in the file when this returns, unless the file cannot be written."""
        self._waiting.append((row["step"], (json.dumps(row) + "\n").encode()))
        self._flush()

    def sync(self) -> None:
        """Put all rows on disk; rows that cannot be written stay in memory."""
        self._flush()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """Write the waiting rows and close the file; if that fails, log which rows are lost."""
        self._flush()
        if self._waiting:
            first, last = self._waiting[0][0], self._waiting[-1][0]
            log.error("%s lacks the rows of steps %d to %d: they could not be written",
                      self._path, first, last)  # fmt: skip
        with suppress(OSError):
            os.close(self._file)

    def _flush(self) -> None:
        if not self._waiting:
            return
        content = b"".join(line for _, line in self._waiting)
        try:
            self._follow()
            size = os.fstat(self._file).st_size
            written = 0
            try:
                while written < len(content):
                    written += os.write(self._file, content[written:])
            except OSError:
                os.ftruncate(self._file, size)  # leaves no half row
                raise
        except OSError as error:
            self._say(error)
            return
        self._waiting = []
        if self._said:
            log.info("%s can be written again", self._path)
            self._said = False

    def _follow(self) -> None:
        """Go on in a new file where somebody has removed or replaced the one that is open."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):  # noqa: PTH116
                return
        file = self._open()
        os.close(self._file)
        self._file = file
        log.warning("%s was removed or replaced; its rows from step %d on are in a new file",
                    self._path, self._waiting[0][0])  # fmt: skip

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            log.warning("%s cannot be written (%s); its rows wait in memory, training goes on",
                        self._path, error.strerror or error)  # fmt: skip


class TensorBoard:
    """Curves for TensorBoard. Once they cannot be written, a warning says so, and no more follow.

    Args:
        folder: folder of the event files.
        step: number of optimiser steps done so far; points of later steps are hidden, also those
            in the files of other writers. So a run must have one writer only.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def add(self, group: str, row: dict[str, Any]) -> None:
        """Add a point to the curve of each value in a row; the curves are named after a group."""
        for key, value in row.items():
            if value is not None and key not in ("step", "time"):
                self._do("add_scalar", f"{group}/{key}", value, row["step"])

    def show(self, name: str, path: Path, step: int) -> None:
        """Show a PNG under a name."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._do("add_image", name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the points that wait in memory."""
        self._do("flush")

    def close(self) -> None:
        """Write the points that wait in memory, and close the files."""
        self._do("close")

    def _do(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments, **options)
        except Exception as error:  # its thread passes on any error of its own
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        log.warning("%s cannot be written (%s); training goes on without its curves",
                    self._folder, error)  # fmt: skip
