"""The HTML page of `mae-scale report`: one run, or several on common axes."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from mae_scale.config.identity import flatten
from mae_scale.data.formats import MAX_FILE, open_image
from mae_scale.errors import UserError
from mae_scale.files import read_file, write_atomically
from mae_scale.launch.console import size_text
from mae_scale.tasks.task import AVERAGED
from mae_scale.train.records import METRICS, VALIDATION
from mae_scale.watching.charts import Curve, Values, draw
from mae_scale.watching.health import duration
from mae_scale.watching.run_view import SESSION, RunView

METRIC_KEYS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "images_per_second",
               "data_wait", "memory_gb", "mfu", "bad_steps")  # fmt: skip
_MOST_PIXELS = 1 << 26  # most pixels of a picture that is read; those of a run have a tenth of it
PICTURES = 6  # largest number of pictures of a run
PICTURE_SIDE = 1400  # largest width of a picture on the page, in pixels
ROWS = 40  # number of last rows that a table shows
VERSIONS = {"version": "mae-scale", "torch": "torch", "deepspeed": "DeepSpeed"}
# Colours that can be told apart on light and dark ground, and by most colour-blind people (after
# Okabe and Ito).
COLOURS = ("#1f83c4", "#e07b12", "#14a06f", "#c9559a", "#8a6be0", "#b8960c", "#d4493b", "#5b8f99")
# The template escapes every value; only what `draw` returns counts as markup.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the page about some runs; to show it, no other file and no network is needed.

    Args:
        folders: run folders.
        out: HTML file to write or replace.

    Raises:
        UserError: a folder is no run folder, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} must end in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file to write")
    views = [RunView(folder) for folder in folders]
    names = [view.name for view in views]
    runs = [
        ReportedRun(view, view.name if names.count(view.name) == 1 else str(view.folder), colour)
        for view, colour in zip(views, cycle(COLOURS), strict=False)
    ]
    tasks: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if len(run.metrics["step"]):
            tasks.setdefault(run.view.task.name, []).append(run)
    content = _TEMPLATES.get_template("report.html").render(
        runs=runs,
        date=time.strftime("%Y-%m-%d %H:%M"),
        charts={name: charts(of_task) for name, of_task in tasks.items()},
        differences=_differences(runs),
        some_average=any(AVERAGED in name for run in runs for name in run.validations),
        some_restarts=any(run.view.resumes for run in runs),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


@dataclass
class ReportedRun:
    """A run on the page, with its label and its colour there."""

    view: RunView
    label: str
    colour: str

    @cached_property
    def metrics(self) -> dict[str, Values]:
        """Columns of metrics.jsonl, float64 [rows] by key; NaN where a row has no number."""
        return self._columns(METRICS, METRIC_KEYS)

    @cached_property
    def validations(self) -> dict[str, Values]:
        """Columns of validation.jsonl; of the scores only those that a row has."""
        names = [prefix + name for name in self.view.task.scores for prefix in ("", AVERAGED)]
        columns = self._columns(VALIDATION, ("step", "epoch", *names))
        return {k: v for k, v in columns.items() if k not in names or np.isfinite(v).any()}

    def _columns(self, file: str, keys: tuple[str, ...]) -> dict[str, Values]:
        columns: dict[str, list[float]] = {key: [] for key in keys}
        for row in self.view.rows(file):
            for key, column in columns.items():
                value = row.get(key)
                column.append(value if isinstance(value, (int, float)) else np.nan)
        return {key: np.array(column, np.float64) for key, column in columns.items()}

    @property
    def lengths(self) -> tuple[float, float]:
        """Images of an optimiser step, and steps of an epoch; the run must have rows."""
        step, epoch, samples = (self.metrics[key][-1] for key in ("step", "epoch", "samples"))
        return float(samples / step), round(float(step / epoch), 6)

    @property
    def numbers(self) -> dict[str, str]:
        """Numbers that the run's card shows, by their names."""
        view, metrics, total = self.view, self.metrics, self.view.facts.get("total_steps")
        numbers = {"step": f"{view.step:,} of {total:,}" if total else f"{view.step:,}"}
        if len(metrics["step"]):
            rates = metrics["images_per_second"]
            finite = metrics["loss"][np.isfinite(metrics["loss"])]
            numbers |= {
                "epoch": f"{metrics['epoch'][-1]:.4g}",
                "loss": f"{finite[-1]:.4f}" if len(finite) else "not finite",
                "images/s": f"{np.median(rates):,.0f}",
                "data wait": f"{100 * np.median(metrics['data_wait']):.2g} %",
                "memory": f"{np.nanmax(metrics['memory_gb'], initial=0):.3g} GB",
            }
            mfu = metrics["mfu"][np.isfinite(metrics["mfu"])]
            if len(mfu):
                numbers["MFU"] = f"{100 * np.median(mfu):.3g} %"
            seconds = np.sum(np.diff(metrics["samples"], prepend=0.0) / rates)
            numbers["trained for"] = duration(seconds)  # without validations and saves
            if bad := np.nanmax(metrics["bad_steps"], initial=0):
                numbers["steps not applied"] = f"{bad:.0f}"
        if best := view.best_validation():
            score, row = best
            numbers[f"best {score}"] = f"{row[score]:.2f} % at step {row['step']:,}"
        return {**numbers, "restarts": str(len(view.resumes))}

    @property
    def pictures(self) -> dict[str, str | None]:
        """Reconstructions as data URIs by their captions; None: the file cannot be read.

        They are those of training, evenly spread, and what `mae-scale reconstruct` has written.
        """
        files = sorted(self.view.folder.glob("reconstructions/step-*.png"))
        if len(files) > PICTURES:
            places = np.linspace(0, len(files) - 1, PICTURES).round().astype(int)
            files = [files[i] for i in places]
        files += self.view.folder.glob("reconstructions.png")
        return {path.name: picture(path) for path in files}

    @property
    def events(self) -> list[list[Any]]:
        """Rows of the table of starts and stops."""
        keys = ("host", "world_size", "zero_stage", "precision", "device")
        return [
            [row["event"], _date(row.get("time")), f"{row['step']:,}", *map(row.get, keys),
             ", ".join(f"{name} {row[key]}" for key, name in VERSIONS.items() if key in row)]
            for row in self.view.history[-ROWS:]
        ]  # fmt: skip

    @property
    def starts(self) -> int:
        """Number of times that the run was started."""
        return sum(row["event"] in SESSION for row in self.view.history)

    @property
    def saves(self) -> list[list[Any]]:
        """Rows of the table of checkpoints."""
        keys = ("world_size", "zero_stage", "precision", "score")
        return [
            [f"{saved.commit['step']:,}", _date(saved.time), size_text(saved.bytes),
             *map(saved.commit.get, keys),
             saved.visible_damage() or ("kept for good" if saved.commit.get("milestone") else "")]
            for saved in self.view.checkpoints[-ROWS:]
        ]  # fmt: skip

    @property
    def config(self) -> str:
        """Config as YAML."""
        return yaml.safe_dump(self.view.config, sort_keys=False, allow_unicode=True)


def charts(runs: list[ReportedRun]) -> dict[str, Markup]:
    """Draw the charts of runs of one task, by their titles.

    The common axis is the optimiser step if batch and epoch have the same lengths in all runs, and
    the epoch otherwise.
    """
    axis = "step" if len({run.lengths for run in runs}) == 1 else "epoch"
    end = max(float(run.metrics[axis][-1]) for run in runs)
    label = "optimiser step" if axis == "step" else "epoch"
    marks = [
        (step if axis == "step" else step / run.lengths[1], run.colour)
        for run in runs
        for step in run.view.resumes
    ]
    drawn: dict[str, Markup] = {}

    def chart(title: str, key: str, **how: Any) -> None:
        curves = [Curve(run.metrics[axis], run.metrics[key], run.colour) for run in runs]
        if np.nanmax(np.concatenate([curve.y for curve in curves]), initial=0) > 0:
            drawn[title] = Markup(draw(curves, label, end, marks, **how))

    chart("Loss", "loss", smooth=True)
    for key, text in runs[0].view.task.scores.items():
        curves = [
            Curve(run.validations[axis], run.validations[name], run.colour, name != key)
            for run in runs
            for name in (key, AVERAGED + key)
            if name in run.validations
        ]
        if curves:
            drawn[f"Validation: {text}"] = Markup(draw(curves, label, end, marks))
    chart("Learning rate", "lr", scale="zero")
    chart("Gradient norm", "grad_norm", smooth=True)
    chart("Images per second", "images_per_second", scale="zero")
    chart("Share of the time spent waiting for data", "data_wait", scale="percent")
    chart("Memory of a rank, GB", "memory_gb", scale="zero")
    chart("Model FLOPs utilisation", "mfu", scale="percent")
    chart("Steps not applied so far", "bad_steps", scale="zero")
    return drawn


def picture(path: Path) -> str | None:
    """Return a picture as the data URI of a JPEG; None: it cannot be read."""
    stream = io.BytesIO()
    try:
        with open_image(read_file(path, MAX_FILE), _MOST_PIXELS) as image:
            shown = image.convert("RGB")
    except Exception:  # PIL passes on all errors of its decoders
        return None
    shown.thumbnail((PICTURE_SIDE, 4 * PICTURE_SIDE))
    shown.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _differences(runs: list[ReportedRun]) -> list[list[str]]:
    """Return the rows of a table of the config keys in which the runs differ."""
    configs = [flatten(run.view.config) for run in runs]
    return [
        [key, *(str(config.get(key, "")) for config in configs)]
        for key in {key: None for config in configs for key in config}
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def _date(seconds: float | None) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""
    except (OverflowError, ValueError, OSError):  # no clock shows it
        return ""
