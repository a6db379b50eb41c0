"""Reading a run folder from outside, without torch, while the run goes on or after it has ended."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_scale.config.yaml_files import read_yaml
from mae_scale.errors import UserError
from mae_scale.files import open_descriptor, read_file
from mae_scale.tasks.task import Task, task_of
from mae_scale.train.records import (
    HISTORY,
    METRICS,
    VALIDATION,
    is_count,
    is_sound,
    readable_rows,
    rising_rows,
)
from mae_scale.world import host

# Age in seconds up to which the last row shows that a run on another host still runs: the lock of
# such a run may not be seen here.
YOUNG_S = 120
SESSION = ("started", "resumed")  # events with which a process begins to train


@dataclass
class Saved:
    """A committed checkpoint."""

    folder: Path
    """Step folder of the checkpoint."""
    commit: Mapping[str, Any]
    """Content of COMMITTED.json."""
    time: float
    """Time of the commit, in seconds since 1970."""

    @property
    def bytes(self) -> int:
        """Size of its files together."""
        return sum(facts["bytes"] for facts in self.commit["files"].values())

    def visible_damage(self) -> str | None:
        """Describe the first file that is missing or has a wrong size; None: there is no such file.

        The files are not read.
        """
        for name, facts in self.commit["files"].items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        return None


class RunView:
    """A run, as its folder shows it.

    Attributes:
        folder: folder of the run, as it was given.
        name: name of the folder.
        config: content of the run's config.yaml, nested.
        history: rows of history.jsonl.
        checkpoints: committed checkpoints, oldest first.
        uncommitted: names of step folders without a commit, which are being written, damaged, or
            left over.

    Raises:
        UserError: the folder is no run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.folder, self.name = folder, folder.resolve().name
        try:
            self.config = read_yaml(folder / "config.yaml", of_a_run=True)
        except (FileNotFoundError, NotADirectoryError):
            what = "is no run folder: it has no config.yaml" if folder.is_dir() else "is no folder"
            raise UserError(f"{folder} {what}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/config.yaml cannot be read: {_line(error)}") from None
        if not isinstance(self.config, dict):
            raise UserError(f"{folder}/config.yaml is not the config of a run")
        self._flaws: dict[str, Counter[str]] = {HISTORY: Counter()}
        rows = readable_rows(folder / HISTORY, flaws=self._flaws[HISTORY])
        self.history = [row for row in rows if "event" in row and is_sound(row)]
        self.checkpoints: list[Saved] = []
        self.uncommitted: list[str] = []
        for step in sorted((folder / "checkpoints").glob("step-*")):
            saved = _saved(step)
            self.checkpoints.append(saved) if saved else self.uncommitted.append(step.name)
        self._locked = _is_locked(folder)

    def rows(self, file: str, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of a record of steps, as `rising_rows` does.

        Args:
            file: name of the record.
            last_bytes: number of bytes at the end of the file to look at; None: the whole file.
        """
        self._flaws[file] = Counter()
        rows = rising_rows(self.folder / file, last_bytes, self._flaws[file])
        return filter(_is_of_metrics, rows) if file == METRICS else rows

    def last_rows(self, most: int) -> list[dict[str, Any]]:
        """Read at most `most` last rows of metrics.jsonl, without reading a long file whole."""
        return list(self.rows(METRICS, 600 * most))[-most:]

    def _newest(self) -> list[dict[str, Any]]:
        """Read the last row of metrics.jsonl; it is empty if there is none."""
        rows = rising_rows(self.folder / METRICS, 1200)
        return list(filter(_is_of_metrics, rows))[-1:]

    @property
    def flaws(self) -> list[str]:
        """Lines about what has been left out of the records that were read so far."""
        return [
            f"{file}: {what}" + (f": {count}" if count else "")
            for file, flaws in self._flaws.items()
            for what, count in flaws.items()
        ]

    @property
    def task(self) -> Task:
        """Task of the run."""
        return task_of(self.config)

    def best_validation(self) -> tuple[str, dict[str, Any]] | None:
        """Return the name of the deciding score, and the first validation in which it is highest.

        None: the run has no validation with a score.
        """
        return self.task.best_row(self.rows(VALIDATION))

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that the last start of the run wrote down: length, processes, versions.

        They are empty before the first start.
        """
        starts = [row for row in self.history if row["event"] in SESSION]
        return starts[-1] if starts else {}

    @property
    def model(self) -> str:
        """Name of the model's architecture."""
        return str(self.section("model").get("name", "unknown model"))

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the config; it is empty where the config does not have it."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def resumes(self) -> list[int]:
        """Steps from which the run went on."""
        return [row["step"] for row in self.history if row["event"] == "resumed"]

    @property
    def step(self) -> int:
        """Number of optimiser steps done, by the newest row or checkpoint."""
        steps = [row["step"] for row in [*self._newest(), *self.history[-1:]]]
        return max([*steps, *(saved.commit["step"] for saved in self.checkpoints[-1:])], default=0)

    @property
    def last_sign(self) -> float | None:
        """Time of the last row that the run wrote, in seconds since 1970; None: there is no row."""
        times = [row.get("time") for row in [*self.history[-1:], *self._newest()]]
        return max((t for t in times if t is not None), default=None)

    @property
    def state(self) -> str:
        """State of the run: not started, starting, running, stopped, finished or failed.

        A run holds the lock of its folder while it runs. The lock of a run on another host may not
        be seen here; such a run counts as running while its last row is young.
        """
        event = self.history[-1] if self.history else {}
        sign = self.last_sign
        if self._locked:
            began = (self.folder / ".lock").stat().st_mtime  # each start writes it
            return "starting" if sign is None or began > sign else "running"
        if event.get("event") in ("finished", "stopped"):
            return str(event["event"])
        if sign is None:
            return "not started"
        elsewhere = event.get("host") != host()
        return "running" if elsewhere and time.time() - sign < YOUNG_S else "failed"


def _is_of_metrics(row: dict[str, Any]) -> bool:
    """Return whether a row of metrics.jsonl has all values that curves and rates need."""
    positive = ("step", "epoch", "samples", "images_per_second", "time")
    return all((row.get(key) or 0) > 0 for key in positive) and row.get("data_wait") is not None


def _saved(folder: Path) -> Saved | None:
    path = folder / "COMMITTED.json"
    try:
        commit = json.loads(read_file(path, 1 << 24))
        saved = Saved(folder, commit, path.stat().st_mtime)
        counts = [commit["step"], *(facts["bytes"] for facts in commit["files"].values())]
        names = [Path(name).name == name for name in commit["files"]]
        return saved if all(map(is_count, counts)) and all(names) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a run folder.

    The test takes the lock for a moment. A run that starts at that moment finds the lock taken, and
    tries again a second later.
    """
    try:
        with os.fdopen(open_descriptor(folder / ".lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file releases the lock
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system
        return False
    return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
