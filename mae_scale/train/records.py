"""Reading the records of a run, without torch: those who only look need not wait for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"  # in the run folder, as the others
VALIDATION = "validation.jsonl"
HISTORY = "history.jsonl"


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
    if not path.exists():
        return
    with path.open("rb") as file:
        if last_bytes is not None and path.stat().st_size > last_bytes:
            file.seek(-last_bytes, 2)
            file.readline()  # what is left of a row
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # cut short by a kill, or just being written
                continue
            if whole and not line.endswith(b"\n"):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row
