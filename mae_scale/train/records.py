"""Reading the records of a run, without torch: those who only look need not wait for it."""

from __future__ import annotations

import json
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
