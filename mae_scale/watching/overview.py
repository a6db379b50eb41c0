"""The overview of `mae-scale status`: one line for each run below a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mae_scale.errors import UserError
from mae_scale.launch.outputs import one_line
from mae_scale.watching.health import duration, pace_of
from mae_scale.watching.run_view import RunView

DEPTH = 4  # levels of folders in which runs are searched; the runs of a sweep lie in the third
ROWS = 40  # number of last rows of the metrics that are read
NAME = 22  # width of a name, in characters
HEAD = f"{'run':{NAME}} {'state':<11} {'step':>15} {'':>4} {'loss':>8}  {'best or ETA'}"


def runs_below(folder: Path) -> list[Path]:
    """List the run folders below a folder, in the order of their names.

    If the folder is itself a run folder, the list holds it alone.

    Raises:
        UserError: there are no run folders.
    """
    found = []
    for place, folders, files in os.walk(folder):
        if "config.yaml" in files:
            found.append(Path(place))
            folders.clear()
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and depth < DEPTH)
    if not found:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        raise UserError(f"{folder} is no run folder: it has no config.yaml, nor has a folder in it")
    return found


def line(folder: Path, name: str) -> tuple[str, str]:
    """Describe a run on one line of at most 80 characters.

    Args:
        folder: folder of the run.
        name: name that is shown.

    Returns:
        The state of the run ("failed" where its folder cannot be read), and the line.
    """
    shown = one_line(name)
    shown = shown if len(shown) <= NAME else f"…{shown[1 - NAME :]}"
    try:
        run = RunView(folder)
        state, rows, facts = run.state, run.last_rows(ROWS), run.facts
        best = run.best_validation()
    except UserError as error:
        what = one_line(str(error).removeprefix(f"{folder}/").removeprefix(f"{folder} "))
        return "failed", f"{shown:{NAME}} {what[: 79 - NAME]}"
    step, total = run.step, facts.get("total_steps")
    steps = f"{step}/{total}" if total else str(step)
    done = f"{min(100, 100 * step // total)}%" if total else ""
    loss = _number(rows[-1].get("loss")) if rows else ""
    last = ""
    pace = pace_of(rows)
    if state == "running" and pace and total:
        last = duration((total - step) * pace.seconds_per_step)
    elif best:
        score, row = best
        last = f"{score} {row[score]:.2f}"
    return state, f"{shown:{NAME}} {state:<11} {steps:>15} {done:>4} {loss:>8}  {last}".rstrip()


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "no number"
