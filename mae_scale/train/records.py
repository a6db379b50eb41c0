"""Reading the records of a run without torch, so that commands that only look start fast."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mae_scale.files import open_file

METRICS = "metrics.jsonl"  # name of a file in the run folder, as the two below
VALIDATION = "validation.jsonl"
HISTORY = "history.jsonl"
MOST_BYTES = 1 << 20  # largest size of a row

# Bounds of the numbers in rows that a run writes. Other programs and people may have written rows,
# too, and code that shows a row or computes with it must not meet a text where a number belongs.
_BOUNDS = {
    "step": (0, 2**53), "epoch": (0, 1e12), "samples": (0, 2**53), "images": (0, 2**53),
    "images_per_second": (1e-9, 1e12), "data_wait": (0, 1e3), "mfu": (0, 1e3),
    "memory_gb": (0, 1e9), "bad_steps": (0, 2**53), "time": (0, 1e11), "total_steps": (1, 2**53),
    "steps_per_epoch": (1e-9, 2**53), "world_size": (1, 2**31), "zero_stage": (0, 3),
}  # fmt: skip
_WHOLE = ("total_steps", "world_size", "zero_stage", "bad_steps")
_NUMBERS = ("loss", "lr", "grad_norm")  # null where they are not finite
_TEXTS = ("event", "host", "task", "precision", "device", "version", "torch", "deepspeed")
_LARGEST = 1e40  # above every float of 32 bits


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a record, without lines that cannot be rows of a run.

    Left out are a last line that a kill cut short, what a crash of the machine left behind, and
    rows for which `is_sound` returns False.
    """
    return [row for row in readable_rows(path, whole=True) if is_sound(row)]


def is_sound(row: dict[str, Any]) -> bool:
    """Return whether a row could have been written by a run: numbers where numbers belong."""
    return all(_is_sound(key, value) for key, value in row.items())


def _is_sound(key: str, value: Any) -> bool:
    if value is None:
        return key != "event"
    if key in _TEXTS:
        return isinstance(value, str)
    if type(value) not in (int, float):
        return key not in _BOUNDS and key not in _NUMBERS
    if key in _WHOLE and type(value) is not int:
        return False
    low, high = _BOUNDS.get(key, (-_LARGEST, _LARGEST))
    special = type(value) is float and not math.isfinite(value)  # a score may be NaN
    return low <= value <= high or (special and key not in _BOUNDS)


def readable_rows(
    path: str | Path, last_bytes: int | None = None, whole: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record, whatever their values; lines that are no rows are left out.

    Args:
        path: path of the file, which need not exist.
        last_bytes: number of bytes at the end of the file to look at; None: the whole file.
        whole: whether to leave out a last line without a line end, even if it can be read.
    """
    try:
        file = open_file(path)
    except OSError:  # there is nothing, or no file
        return
    with file:
        if last_bytes is not None and os.fstat(file.fileno()).st_size > last_bytes:
            file.seek(-last_bytes, 2)
            file.readline(last_bytes)  # the rest of a row
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
            if isinstance(row, dict) and is_count(row.get("step")):
                yield row


def is_count(value: Any) -> bool:
    """Return whether a value from a JSON file is a whole number that is not negative."""
    return type(value) is int and 0 <= value < 2**53


def _skip_line(file: BinaryIO, part: bytes) -> None:
    """Read to the end of a line of which `part` has been read already."""
    while part and not part.endswith(b"\n"):
        part = file.readline(MOST_BYTES)
