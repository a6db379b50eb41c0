"""Show how runs are doing, on one screen, read from their folders alone.

For a folder of runs, such as that of a sweep, it prints one line for each run.
"""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mae_scale.commands.arguments import Parser
from mae_scale.errors import UserError
from mae_scale.launch.console import size_text
from mae_scale.watching.health import Rows, duration, health, pace_of, seconds_to_save
from mae_scale.watching.overview import HEAD, line, runs_below
from mae_scale.watching.run_view import RunView

ROWS = 400  # number of last rows of the metrics that are read
BAR = 40  # width of the bar of progress, in characters
COLOURS = {"running": 32, "finished": 32, "failed": 31, "!": 33}


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a folder of runs"
    )
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="print again every so many seconds"
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Print the status of each run, once or again and again."""
    options = parser(prog).parse_args(argv)
    if options.watch is not None and not 0.1 <= options.watch <= 86400:
        raise UserError(f"--watch {options.watch:g} must lie in 0.1 to 86400 seconds")
    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's output is something else
        sys.stdout.reconfigure(errors="replace")
    colours = terminal and "NO_COLOR" not in os.environ
    clear = "\033[H\033[2J" if options.watch is not None and terminal else ""
    with suppress(KeyboardInterrupt):
        while True:
            text = "\n\n".join(_shown(folder, colours) for folder in options.runs)
            print(clear + text, flush=True)
            if options.watch is None:
                break
            time.sleep(options.watch)
    return 0


def _shown(folder: Path, colours: bool) -> str:
    """Compose the status of a run, or one line for each run of a folder of runs."""
    found = [folder] if (folder / "config.yaml").exists() else runs_below(folder)
    if found == [folder]:
        return status(RunView(folder), colours)
    lines = [HEAD]
    for run in found:
        state, text = line(run, str(run.relative_to(folder)))
        lines.append(_paint(text, state) if colours else text)
    return "\n".join(lines)


def _paint(text: str, key: str) -> str:
    return f"\033[{COLOURS[key]}m{text}\033[0m" if key in COLOURS else text


def status(run: RunView, colours: bool = False, now: float | None = None) -> str:
    """Compose the text for one run, in lines of at most 80 characters, as far as names allow.

    Args:
        run: run to describe.
        colours: whether to mark state and warnings with the colours of a terminal.
        now: seconds since 1970; None: the time of the clock.
    """
    now = time.time() if now is None else now

    def paint(text: str, key: str) -> str:
        return _paint(text, key) if colours else text

    rows, facts, state = run.last_rows(ROWS), run.facts, run.state
    lines = [f"{printable(str(run.folder))}: {facts.get('task', 'training')} of {run.model}"]
    where = [paint(state, state)]
    if facts.keys() >= {"host", "world_size", "zero_stage", "precision"}:
        size = facts["world_size"]
        where.append(f"on {facts['host']}, {size} process{'' if size == 1 else 'es'}")
        where.append(f"ZeRO-{facts['zero_stage']}, {facts['precision']}")
    lines += [", ".join(where), ""]

    def add(name: str, *parts: str | None) -> None:
        lines.append(f"  {name:<15}{'   '.join(part for part in parts if part)}".rstrip())

    step, total = run.step, facts.get("total_steps")
    if total:
        done = int(max(0, min(BAR, BAR * step // total)))
        lines.append(f"  [{'#' * done}{'-' * (BAR - done)}] {100 * step / total:.1f} %")
    per_epoch = facts.get("steps_per_epoch")
    epochs = (
        f"epoch {step / per_epoch:.2f} of {total / per_epoch:.5g}" if total and per_epoch else ""
    )
    add("step", f"{step:,} of {total:,}" if total else f"{step:,}", epochs)
    pace = pace_of(rows)
    if state == "running" and pace and total:
        left = max(0, min((total - step) * pace.seconds_per_step, 1e10))
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + left))
        add("ETA", f"{duration(left)} ({end}), without validations and saves")
    if rows:
        add("loss", _number(rows[-1].get("loss"), ".4f"), _trend(rows))
        add("learning rate", _number(rows[-1].get("lr"), ".2e"),
             f"gradient norm {_number(rows[-1].get('grad_norm'), '.3g')}")  # fmt: skip
    if pace:
        mfu = rows[-1].get("mfu")
        add("speed", f"{pace.images_per_second:,.0f} images/s",
             f"{pace.seconds_per_step:.3g} s a step", mfu and f"MFU {mfu:.0%}")  # fmt: skip
        memory = _number(rows[-1].get("memory_gb"), ".3g")
        add("data wait", f"{pace.data_wait:.0%}", f"memory {memory} GB")
    if run.last_sign is not None:
        often = f"one every {duration(pace.interval)}" if pace and pace.interval else ""
        add("last row" if rows else "last sign", f"{duration(now - run.last_sign)} ago", often)
    due = seconds_to_save(run, now, step, pace) if state == "running" else None
    add("checkpoint", *_saved(run, now, due))
    best = run.best_validation()
    if best:
        score, row = best
        add("best", f"{score} {row[score]:.2f} % at step {row['step']:,}")
    if run.resumes:
        add("restarts", f"{len(run.resumes)}, the last from step {run.resumes[-1]:,}")
    lines.append("")
    unhealthy = health(run, rows, state, now)
    lines += [paint(f"  ! {text}", "!") for text in unhealthy] or ["  nothing unusual"]
    return "\n".join(lines)


def _trend(rows: Rows) -> str | None:
    """Compare the mean loss of the last rows with that of as many rows before them.

    None: there are fewer than four rows with a loss.
    """
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    half = min(100, len(losses) // 2)
    if half < 2:
        return None
    before = sum(losses[-2 * half : -half]) / half
    change = sum(losses[-half:]) / half - before
    steps = rows[-1]["step"] - rows[-1 - half]["step"]
    return f"mean of the last {steps:,} steps {change:+.4f} against those before"


def _saved(run: RunView, now: float, due: float | None) -> tuple[str, str]:
    """Describe the newest checkpoint, and all checkpoints together.

    Args:
        run: run to describe.
        now: seconds since 1970.
        due: seconds until the next checkpoint; None: unknown.
    """
    if not run.checkpoints:
        return "none yet", ""
    last, size = run.checkpoints[-1], sum(saved.bytes for saved in run.checkpoints)
    upcoming = f", next in {duration(due)}" if due is not None and due > 0 else ""
    newest = f"step {last.commit['step']:,}, {duration(now - last.time)} ago{upcoming}"
    return newest, f"{len(run.checkpoints)} kept, {size_text(size)}"


def printable(text: str) -> str:
    """Replace the characters of a name that would move the cursor by `?`."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "not finite"
