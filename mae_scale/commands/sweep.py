"""Run a table of experiments, such as the paper's ablations, beside what the paper reports.

A sweep is a YAML file:

    title: Decoder depth (paper Table 1a)
    seeds: [0]
    pretrain: {config: pretrain_vit_large, train.epochs: 800}     # settings of every row
    finetune: {config: finetune_vit_large}
    linprobe: {config: linprobe_vit_large}
    rows:
      - {name: 1 block, pretrain: {model.decoder_depth: 1}, paper: {finetune: 84.8, linprobe: 65.5}}

For each row a model is pre-trained, and from it one is fine-tuned and one probed. The settings of a
row win over those of every row. `null` in the place of settings leaves a task out, and without
`pretrain` the others start from random weights. Rows with the same settings of pre-training share
that run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mae_scale.commands.arguments import Parser
from mae_scale.config.identity import flatten
from mae_scale.config.keys import Section
from mae_scale.config.parsing import RECIPES, parse, shown
from mae_scale.config.value_types import From0, Text
from mae_scale.config.yaml_files import load_yaml
from mae_scale.errors import STOPPED, UserError
from mae_scale.files import write_atomically
from mae_scale.tasks.task import TASKS
from mae_scale.train.records import VALIDATION, read_metrics
from mae_scale.train.run_dir import read_history
from mae_scale.world import World, is_slurm_task

log = logging.getLogger("mae_scale")

COLUMNS = {"finetune": "fine-tuning", "linprobe": "linear probing"}  # heading by task
STEPS = ("pretrain", *COLUMNS)  # tasks of a row, in the order in which they run
SWEEPS = RECIPES / "sweeps"


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    names = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.yaml")))
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help=f"YAML file, or one of {names}")
    parser.add_argument("--data.train", required=True, help="folder of training shards")
    parser.add_argument("--data.val", required=True, help="folder of validation shards")
    parser.add_argument("--run_dir", required=True, type=Path, help="folder for all runs")
    parser.add_argument(
        "--row", type=int, help="number of the one row to run, from 0 (in a Slurm array)"
    )
    parser.add_argument(
        "--launch", default=shlex.join([sys.executable, "-m", "mae_scale"]),
        help="what starts a run, such as 'torchrun --standalone --nproc_per_node 8 -m mae_scale'; "
        "not needed under srun",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Run what is missing, print the table, and return the exit code: 0 done, 85 stopped early."""
    options = parser(prog).parse_args(argv)
    world = World.from_environment()
    if world.size > 1 and not is_slurm_task(os.environ):
        raise UserError(
            "start a sweep alone and say how to launch its runs, such as --launch 'torchrun "
            "--standalone --nproc_per_node 8 -m mae_scale'; only srun can start it on all ranks"
        )
    data = {key: getattr(options, key) for key in ("data.train", "data.val")}
    sweep = read_sweep(_find(options.sweep), options.run_dir, data)
    rows = range(len(sweep.rows))
    if options.row is not None and options.row not in rows:
        raise UserError(f"--row {options.row} must be from 0 to {rows[-1]}")
    code = 0
    if not options.table:
        wanted = sweep.runs if options.row is None else sweep.runs_of(options.row)
        code = run_all(wanted, shlex.split(options.launch))
    if code in (0, 1) and world.rank == 0:
        results = sweep.results()
        print(table(sweep.title, results))
        if options.run_dir.is_dir():
            write_atomically(options.run_dir / "sweep.json", json.dumps(results, indent=1) + "\n")
    return code


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its command without the launcher."""

    task: str
    """Name of its task."""
    arguments: tuple[str, ...]
    """Arguments behind the name of the task, `--key=value` each."""
    run_dir: Path
    """Folder of the run."""

    def score(self) -> float | None:
        """Return the deciding score of its last validation, in percent.

        Where the run keeps a moving average of the weights, it is the score of that. None: the run
        is not finished, or has no score.
        """
        rows = read_metrics(self.run_dir / VALIDATION)
        if not rows or not _is_finished(self.run_dir):
            return None
        score = TASKS[self.task].best_score(rows[-1])
        return rows[-1][score] if score else None


def _is_finished(run_dir: Path) -> bool:
    events = read_history(run_dir)
    return bool(events) and events[-1]["event"] == "finished"


_Name = Annotated[Text, Field(max_length=100)] | int | float
_Settings = dict[str, Any] | None


class Row(Section):
    """A row of a sweep file."""

    name: _Name
    pretrain: _Settings = None
    finetune: _Settings = None
    linprobe: _Settings = None
    paper: dict[str, float] | None = None


class SweepFile(Section):
    """A sweep file, as the text at the head of this module describes it."""

    title: _Name = ""
    seeds: list[From0] = Field(default=[0], min_length=1)
    pretrain: _Settings = None
    finetune: _Settings = None
    linprobe: _Settings = None
    rows: list[Row] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> SweepFile:
        """Read a sweep file.

        Raises:
            UserError: it is no sweep.
        """
        content = load_yaml(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        kind: type[Section] = cls
        if place[:1] == ["rows"] and len(place) > 2:
            row = content["rows"][int(place[1])]
            place, kind = [f"row {row.get('name', place[1])}", *place[2:3]], Row
        if first["type"] == "extra_forbidden":
            what = f"unknown key '{place.pop()}'; known: {', '.join(kind.model_fields)}"
        elif first["type"] == "missing":
            what = f"it lacks the key '{place.pop()}'"
        else:
            what = f"{first['msg'].lower()}, not {shown(first['input'])}"
        raise UserError(": ".join([f"{path} is no sweep", *place[:2], what]))

    def settings(self, row: Row, task: str) -> dict[str, Any] | None:
        """Merge the config keys of a task of a row; None where the row leaves the task out."""
        own = getattr(row, task)
        if task not in self.model_fields_set or (task in row.model_fields_set and own is None):
            return None
        merged = {**flatten(getattr(self, task) or {}), **flatten(own or {})}
        return {key: "null" if value is None else value for key, value in merged.items()}


@dataclass
class Sweep:
    """The runs that a sweep file asks for."""

    title: str
    """Title of the table."""
    rows: list[Row]
    """Rows of the file."""
    measured: list[dict[str, list[Run]]]
    """For each row, by task, the runs that are measured, one for each seed."""
    needed: list[list[Run]]
    """For each row, all its runs, in the order in which they run."""

    @property
    def runs(self) -> list[Run]:
        """All runs of all rows, each once."""
        return list(dict.fromkeys(run for row in self.needed for run in row))

    def runs_of(self, row: int) -> list[Run]:
        """Return the runs of one row, in the order in which they run."""
        return self.needed[row]

    def results(self) -> list[dict[str, Any]]:
        """Return for each row its `name`, its `paper` and, by task, the score of each seed.

        The score is None where the run is not finished.
        """
        return [
            {
                "name": str(row.name),
                **{task: [run.score() for run in runs] for task, runs in measured.items()},
                "paper": row.paper or {},
            }
            for row, measured in zip(self.rows, self.measured, strict=True)
        ]


def _find(name: str) -> Path:
    for path in (Path(name), SWEEPS / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.yaml")))
    raise UserError(f"{name!r} is neither a file nor one of the sweeps {names}")


def read_sweep(path: Path, run_dir: Path, data: dict[str, str]) -> Sweep:
    """Read a sweep file and check the settings of each of its runs; nothing is written.

    Args:
        path: file that describes the sweep.
        run_dir: folder for all runs, which are named `seed0/pretrain/ROW` and so on.
        data: config keys that all runs get, and their values.

    Raises:
        UserError: the file is no sweep, or a row, which the message names, has wrong settings.
    """
    file = SweepFile.read(path)
    sweep = Sweep(str(file.title) or path.stem, file.rows, [], [])
    folders: dict[tuple[Any, ...], Path] = {}
    for row in sweep.rows:
        slug = re.sub(r"\W+", "-", str(row.name)).strip("-").lower()
        if not slug:
            raise UserError(f"{path}: the name of row {row.name!r} has no letter and no digit")
        measured: dict[str, list[Run]] = {}
        needed: list[Run] = []
        for seed in file.seeds:
            weights: Path | None = None
            for task in STEPS:
                settings = file.settings(row, task)
                if settings is None:
                    continue
                if weights is not None:
                    settings["weights"] = weights
                elif task != "pretrain":
                    settings["weights"] = "null"
                settings |= {"seed": seed, **data}
                key = (task, *map(str, settings.items()))
                place = folders.setdefault(key, run_dir / f"seed{seed}" / task / slug)
                if list(folders.values()).count(place) > 1:
                    raise UserError(f"{path}: two rows have the name {row.name}")
                arguments = [f"--{name}={value}" for name, value in settings.items()]
                run = Run(task, (*arguments, f"--run_dir={place}"), place)
                try:
                    parse(TASKS[task].config, list(run.arguments), task)
                except UserError as error:
                    raise UserError(f"{path}: row {row.name}, {task}: {error}") from None
                needed.append(run)
                if task == "pretrain":
                    weights = place
                else:
                    measured.setdefault(task, []).append(run)
        if not measured:
            raise UserError(f"{path}: row {row.name} has neither finetune nor linprobe")
        sweep.measured.append(measured)
        sweep.needed.append(needed)
    return sweep


def run_all(runs: list[Run], launch: list[str]) -> int:
    """Start the runs one after the other; a run that is finished says so and ends at once.

    If a run fails, only the runs that start from its weights are left out. Wrong settings end the
    sweep.

    Args:
        runs: runs in the order in which they start.
        launch: command that starts a run, without the name of the task.

    Returns:
        The exit code: 0 where all runs succeed, 85 where a run was stopped early, 2 for wrong
        settings, and otherwise the exit code of the first run that failed.
    """
    failed: dict[Path, int] = {}
    with _forwarded_signals() as child:
        for number, run in enumerate(runs, start=1):
            start = next((a for a in run.arguments if a.startswith("--weights=")), "")
            if Path(start.partition("=")[2]) in failed:
                continue
            print(f"sweep: run {number} of {len(runs)}: {run.task} in {run.run_dir}", flush=True)
            child[:] = [subprocess.Popen([*launch, run.task, *run.arguments])]
            code = child[0].wait()
            # The signal tells of a stop, too: torchrun ends with 1 whatever its processes end with.
            if child[1:] or code == STOPPED:
                return STOPPED
            if code == 2:
                return 2
            if code:
                print(f"sweep: {run.run_dir} failed with exit code {code}", file=sys.stderr)
                failed[run.run_dir] = code
    return next(iter(failed.values()), 0)


@contextmanager
def _forwarded_signals() -> Iterator[list[Any]]:
    """Pass signals that stop a run on to the child process.

    Yields:
        A list into which the caller puts the child; the number of each signal is appended to it.
    """
    child: list[Any] = []
    passed_on = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    numbers = (*passed_on, signal.SIGINT, signal.SIGHUP)

    def forward(number: int, frame: Any) -> None:
        if child:
            child.append(number)
            # The signals of Ctrl-C and of a closed terminal have reached the child already.
            if number in passed_on and child[0].poll() is None:
                child[0].send_signal(number)

    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(title: str, results: list[dict[str, Any]]) -> str:
    """Format the results, one line for each row.

    Of several seeds a cell shows the mean and, in parentheses, the lowest and the highest score.
    The paper's numbers stand beside those that are measured.

    Args:
        title: title of the table.
        results: results as `Sweep.results` returns them.
    """
    columns = [task for task in COLUMNS if any(task in row for row in results)]
    has_paper = any(row["paper"] for row in results)
    several = any(len(row.get(task, ())) > 1 for row in results for task in columns)
    width = max(12, *(len(str(row["name"])) for row in results)) + 2
    cell = 22 if several else 10
    head = [" " * width + "".join(f"{COLUMNS[t]:>{cell + 8 * has_paper}}" for t in columns)]
    if has_paper:
        head.append(" " * width + f"{'measured':>{cell}}{'paper':>8}" * len(columns))
    lines = [title, "top-1 in percent", *head]
    for row in results:
        text = f"{row['name']!s:<{width}}"
        for task in columns:
            text += f"{_cell(row.get(task)):>{cell}}"
            if has_paper:
                published = row["paper"].get(task)
                text += f"{'' if published is None else f'{published:.1f}':>8}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def _cell(values: list[float | None] | None) -> str:
    if values is None:
        return ""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"{len(there)} of {len(values)} runs" if len(values) > 1 else "-"
    mean = f"{sum(there) / len(there):.2f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.2f}-{max(there):.2f})"
