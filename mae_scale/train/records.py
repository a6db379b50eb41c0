"""Reading the records of a run, without torch: those who only look need not wait for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mae_scale.files import open_file

METRICS = "metrics.jsonl"  # in the run folder, as the others
VALIDATION = "validation.jsonl"
HISTORY = "history.jsonl"
MOST_BYTES = 1 << 20  # of a row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a record; lines that cannot be read are left out.

    Such are a last line that a kill cut short, and what a crash of the machine leaves.
    """
    return list(readable_rows(path, whole=True))


def readable_rows(
    path: Path, last_bytes: int | None = None, whole: bool = False
) -> Iterator[dict[str, Any]]:
    """Give the rows of a record one by one; lines that cannot be read are left out.

    Args:
        path: a file, which need not be there.
        last_bytes: look only at the end of the file.
        whole: leave out a last line without an end, even if it can be read.
    """
    try:
        file = open_file(path)
    except OSError:  # it is not there, or not a file
        return
    with file:
        if last_bytes is not None and os.fstat(file.fileno()).st_size > last_bytes:
            file.seek(-last_bytes, 2)
            file.readline(last_bytes)  # what is left of a row
        while line := file.readline(MOST_BYTES):
            if len(line) == MOST_BYTES:  # no row of ours is so long
                _skip_line(file, line)
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # cut short by a kill, or just being written
                continue
            if whole and not line.endswith(b"\n"):
                continue
            if isinstance(row, dict) and _is_count(row.get("step")):
                yield row


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _skip_line(file: BinaryIO, part: bytes) -> None:
    """Read on to the end of a line, of which `part` has been read."""
    while part and not part.endswith(b"\n"):
        part = file.readline(MOST_BYTES)
