"""Reading the records of a run without torch, so that commands that only look start fast."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from mae_scale.files import open_file

METRICS = "metrics.jsonl"  # name of a file in the run folder, as the two below
VALIDATION = "validation.jsonl"
HISTORY = "history.jsonl"
MOST_BYTES = 1 << 20  # largest size of a row
NOT_ROWS = "lines that are no rows of a run, left out"

# Keys of texts, and of numbers, which are null where there is none or it is not finite.
_TEXTS = ("event", "host", "task", "precision", "device", "version", "torch", "deepspeed", "job")
_NUMBERS = (
    "step", "epoch", "samples", "images", "images_per_second", "data_wait", "mfu", "memory_gb",
    "bad_steps", "time", "total_steps", "steps_per_epoch", "world_size", "zero_stage", "loss", "lr",
    "grad_norm",
)  # fmt: skip
_LARGEST = 1e40  # above every float of 32 bits


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a record, without lines that cannot be rows of a run.

    Left out are a last line that a kill cut short, what a crash of the machine left behind, and
    rows for which `is_sound` returns False.
    """
    return [row for row in readable_rows(path, whole=True) if is_sound(row)]


def is_sound(row: dict[str, Any]) -> bool:
    """Return whether each value of a row has the type that its key has in a run's rows.

    Other programs and people may have written rows, too, and code that shows a row or computes
    with it must not meet a text where a number belongs.
    """
    return all(isinstance(row[key], str) for key in _TEXTS if key in row) and all(
        type(value) in (int, float) and -_LARGEST < value < _LARGEST
        for value in map(row.get, _NUMBERS)
        if value is not None
    )


def rising_rows(
    path: str | Path, last_bytes: int | None = None, flaws: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the sound rows of metrics.jsonl or validation.jsonl, each step once.

    Args:
        path: path of the file, which need not exist.
        last_bytes: number of bytes at the end of the file to look at; None: the whole file.
        flaws: counter to which what is left out is added, by a text that describes it.
    """
    flaws = Counter() if flaws is None else flaws
    last = -1
    for row in readable_rows(path, last_bytes, flaws=flaws):
        if not is_sound(row):
            flaws[NOT_ROWS] += 1
        elif row["step"] <= last:
            flaws["rows that repeat a step, left out"] += 1
        else:
            last = row["step"]
            yield row


def readable_rows(
    path: str | Path,
    last_bytes: int | None = None,
    whole: bool = False,
    flaws: Counter[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record, whatever their values; lines that are no rows are left out.

    Args:
        path: path of the file, which need not exist.
        last_bytes: number of bytes at the end of the file to look at; None: the whole file.
        whole: whether to leave out a last line without a line end, even if it can be read.
        flaws: counter of lines that are no rows; it also gets a file that cannot be read.
    """
    flaws = Counter() if flaws is None else flaws
    try:
        file = open_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        flaws[f"cannot be read: {error.strerror}"] += 0
        return
    with file:
        if last_bytes is not None and os.fstat(file.fileno()).st_size > last_bytes:
            file.seek(-last_bytes, 2)
            file.readline(last_bytes)  # the rest of a row
        while line := file.readline(MOST_BYTES):
            row = None
            if len(line) == MOST_BYTES:  # no row of ours is so long
                _skip_line(file, line)
            else:
                with suppress(ValueError, RecursionError):  # cut short by a kill
                    row = json.loads(line, parse_constant=lambda _: None)  # NaN, Infinity
            ends = line.endswith(b"\n")  # otherwise the row is just being written, or cut short
            if isinstance(row, dict) and is_count(row.get("step")) and (ends or not whole):
                yield row
            elif ends:
                flaws[NOT_ROWS] += 1


def is_count(value: Any) -> bool:
    """Return whether a value from a JSON file is a whole number that is not negative."""
    return type(value) is int and 0 <= value < 2**53


def _skip_line(file: BinaryIO, part: bytes) -> None:
    """Read to the end of a line of which `part` has been read already."""
    while part and not part.endswith(b"\n"):
        part = file.readline(MOST_BYTES)
