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
    """The rows of a record; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def readable_rows(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a record for those who only look: lines that cannot be read are left out.

    Args:
        path: a file, which need not be there.
        last_bytes: look only at the end of the file.
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
            except ValueError:  # cut short by a kill, or just being written
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
