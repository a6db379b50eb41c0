"""The speed of a run and signs of trouble, by the last rows of its metrics."""

from __future__ import annotations

import shutil
from itertools import pairwise
from statistics import median
from typing import Any

from mae_scale.watching.run_view import RunView

RECENT = 20  # number of last rows that rates are computed of
SLOW_DATA = 0.1  # share of the time that waiting for data may take before it is reported

Rows = list[dict[str, Any]]


class Pace:
    """The speed of a run: medians over its last rows.

    Args:
        rows: rows of metrics.jsonl, at least one.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        recent = rows[-RECENT:]
        self.images_per_second = median(row["images_per_second"] for row in recent)
        self.data_wait = median(row["data_wait"] for row in recent)
        batch = rows[-1]["samples"] / rows[-1]["step"]
        self.seconds_per_step = batch / self.images_per_second
        times = [row["time"] for row in recent]
        gaps = [late - early for early, late in pairwise(times)]
        self.interval = median(gaps) if gaps else None
        """Seconds from one row to the next; None: there is only one row."""


def pace_of(rows: Rows) -> Pace | None:
    """Return the pace of a run; None before its first row."""
    return Pace(rows) if rows else None


def health(run: RunView, rows: Rows, state: str, now: float) -> list[str]:
    """List signs of trouble, one line for each.

    Args:
        run: run that is looked at.
        rows: last rows of its metrics.jsonl.
        state: its state, as `RunView.state` has it.
        now: seconds since 1970.
    """
    found = run.flaws
    pace = pace_of(rows)
    if state == "failed":
        found.append("it ended without saying why (killed?); its log has the reason")
    if state == "running":
        found += _signs_of_trouble(run, rows, pace, now)
    bad = rows[-1].get("bad_steps") if rows else 0
    if bad:
        when = next((row["step"] for row in rows if row.get("bad_steps") == bad), 0)
        found.append(f"{bad} steps were not applied (not finite), the last by step {when:,}")
    if rows and (rows[-1].get("loss") is None or rows[-1].get("grad_norm") is None):
        found.append(f"loss or gradient of step {rows[-1]['step']:,} is not finite")
    for saved in run.checkpoints:
        damage = saved.visible_damage()
        if damage:
            found.append(f"checkpoint {saved.folder.name} is damaged: {damage}")
    if run.uncommitted and state != "running":
        found.append(f"not committed, and not counted: {', '.join(run.uncommitted)}")
    free = shutil.disk_usage(run.folder).free
    need = max((saved.bytes for saved in run.checkpoints), default=10**9)
    if free < need and state != "finished":
        found.append(f"the disk has {free / 1e9:.1f} GB left, a checkpoint takes {need / 1e9:.1f}")
    return found


def _signs_of_trouble(run: RunView, rows: Rows, pace: Pace | None, now: float) -> list[str]:
    found: list[str] = []
    if pace is None:
        return found
    if pace.data_wait > SLOW_DATA:
        found.append(f"it waits for data {pace.data_wait:.0%} of the time: more data.workers?")
    if len(rows) >= 3 * RECENT:
        usual = median(row["images_per_second"] for row in rows[:-RECENT])
        if pace.images_per_second < 0.8 * usual:
            found.append(f"slower than before: {usual:,.0f} images/s was usual")
    silent = now - (run.last_sign or now)
    if pace.interval and silent > max(300, 10 * pace.interval):
        found.append(f"no row for {duration(silent)}, one every {duration(pace.interval)} before")
    due = seconds_to_save(run, now, rows[-1]["step"], pace)
    if due is not None and due < -max(300, 5 * pace.seconds_per_step):
        found.append(f"a checkpoint should have been written {duration(-due)} ago")
    return found


def seconds_to_save(run: RunView, now: float, step: int, pace: Pace | None) -> float | None:
    """Estimate the seconds until the next checkpoint; negative: it is overdue; None: unknown.

    Args:
        run: run that is looked at.
        now: seconds since 1970.
        step: optimiser steps done.
        pace: pace of the run; None: only the interval in minutes can be used.
    """
    config = run.section("checkpoint")
    minutes, steps = _interval(config.get("every_minutes")), _interval(config.get("every_steps"))
    waits = []
    if minutes:
        began = max([run.facts.get("time") or now, *(saved.time for saved in run.checkpoints[-1:])])
        waits.append(began + 60 * minutes - now)
    if steps and pace:
        waits.append((steps - step % steps) * pace.seconds_per_step)
    return min(waits, default=None)


def _interval(value: Any) -> float | None:
    return value if type(value) in (int, float) and 0 < value < 1e12 else None


def duration(seconds: float) -> str:
    """Write seconds in the two largest units: 12 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    left = max(0, round(seconds))
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for (unit, size), (smaller, part) in pairwise(units):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"
