"""The charts of a report: curves of the metrics and validations of one or several runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mae_scale.tasks.task import AVERAGED
from mae_scale.train.records import METRICS, VALIDATION, is_sound, readable_rows
from mae_scale.watching.charts import Chart, Curve, Values, draw
from mae_scale.watching.run_view import RunView, is_of_metrics

METRIC_KEYS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "images_per_second",
               "data_wait", "memory_gb", "mfu", "bad_steps")  # fmt: skip

Columns = dict[str, Values]  # values of all rows by key, float64 [rows]


@dataclass
class ReportedRun:
    """A run on the page, with its label and its colour there."""

    view: RunView
    label: str
    colour: str

    @cached_property
    def metrics(self) -> Columns:
        """Columns of metrics.jsonl; NaN where a row has no finite value."""
        return read_columns(self.view.folder / METRICS, METRIC_KEYS, is_of_metrics)

    @cached_property
    def validations(self) -> Columns:
        """Columns of validation.jsonl; NaN where a row does not have a score."""
        names = [prefix + name for name in self.view.task.scores for prefix in ("", AVERAGED)]
        return read_columns(self.view.folder / VALIDATION, ("step", "epoch", *names))

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps of an epoch; the run must have rows."""
        return float(self.metrics["step"][-1] / self.metrics["epoch"][-1])

    @property
    def batch(self) -> float:
        """Images of an optimiser step; the run must have rows."""
        return float(self.metrics["samples"][-1] / self.metrics["step"][-1])

    @property
    def seconds(self) -> float:
        """Seconds that the run has trained, without validations and saves."""
        samples, rate = self.metrics["samples"], self.metrics["images_per_second"]
        return float(np.nansum(np.diff(samples, prepend=0.0) / rate))


def read_columns(
    path: Path, keys: tuple[str, ...], counts: Callable[[dict[str, Any]], bool] = is_sound
) -> Columns:
    """Read the values of some keys from a file of JSON lines.

    Args:
        path: file to read.
        keys: keys whose values are wanted.
        counts: function that says whether a row counts.

    Returns:
        Values by key, float64 [rows]; NaN where a row has no number.
    """
    columns: dict[str, list[float]] = {key: [] for key in keys}
    for row in filter(counts, readable_rows(path)):
        for key, column in columns.items():
            value = row.get(key)
            column.append(value if isinstance(value, (int, float)) else np.nan)
    return {key: np.array(column, np.float64) for key, column in columns.items()}


def curves(runs: list[ReportedRun]) -> list[str]:
    """Compose the charts as pieces of HTML.

    The common axis is the optimiser step if batch and epoch have the same lengths in all runs, and
    the epoch otherwise.
    """
    drawn = [run for run in runs if len(run.metrics["step"])]
    if not drawn:
        return ["<h2>Curves</h2>", "<p>No step has been logged yet.</p>"]
    lengths = {(run.batch, round(run.steps_per_epoch, 6)) for run in drawn}
    axis = "step" if len(lengths) == 1 else "epoch"
    label = "optimiser step" if axis == "step" else "epoch"
    end = max(float(run.metrics[axis][-1]) for run in drawn)
    marks = [
        (step if axis == "step" else step / run.steps_per_epoch, run.colour)
        for run in drawn
        for step in run.view.resumes
    ]

    def chart(title: str, key: str, **how: Any) -> Chart:
        curves = [Curve(run.metrics[axis], run.metrics[key], run.colour) for run in drawn]
        return Chart(title, curves, label, end, marks, **how)

    charts = [
        chart("Learning rate", "lr", scale="zero"),
        chart("Gradient norm", "grad_norm", smooth=True),
        chart("Images per second", "images_per_second", scale="zero"),
        chart("Share of the time spent waiting for data", "data_wait", scale="percent"),
        chart("Memory of a rank, GB", "memory_gb", scale="zero"),
    ]
    if any(np.isfinite(run.metrics["mfu"]).any() for run in drawn):
        charts.append(chart("Model FLOPs utilisation", "mfu", scale="percent"))
    if any(np.nanmax(run.metrics["bad_steps"], initial=0) > 0 for run in drawn):
        charts.append(chart("Steps not applied so far", "bad_steps", scale="zero"))
    scores = _validation_charts(drawn, axis, label, end, marks)
    loss = chart("Loss", "loss", smooth=True)
    both = draw(loss, 1240, 340).replace("<svg", '<svg class="broad"', 1)
    both += draw(loss, 420, 280).replace("<svg", '<svg class="narrow"', 1)
    notes = ["Loss and gradient norm: moving means, and faintly what they are of."]
    if marks:
        notes.append("Dotted lines: the run was stopped or ended there, and went on.")
    if any(curve.dashed for score in scores for curve in score.curves):
        notes.append("Dashed curves: the moving average of the weights.")
    legend = "".join(
        f'<li><span class="chip" style="--colour:{run.colour}"></span>{escape(run.label)}</li>'
        for run in drawn
    )
    return [
        "<h2>Curves</h2>",
        f'<ul class="legend">{legend}</ul>' if len(runs) > 1 else "",
        f'<div class="card wide"><h3>Loss</h3>{both}</div>',
        f'<div class="grid">{"".join(map(_chart_card, [*scores, *charts]))}</div>',
        f'<p class="soft">{" ".join(notes)}</p>',
    ]


def _validation_charts(
    runs: list[ReportedRun], axis: str, label: str, end: float, marks: list[tuple[float, str]]
) -> list[Chart]:
    charts = []
    labels = {name: text for run in runs for name, text in run.view.task.scores.items()}
    for key, text in labels.items():
        curves = [
            Curve(run.validations[axis], run.validations[name], run.colour, name != key)
            for run in runs
            for name in (key, AVERAGED + key)
            if name in run.validations and np.isfinite(run.validations[name]).any()
        ]
        if curves:
            charts.append(Chart(f"Validation: {text}", curves, label, end, marks))
    return charts


def _chart_card(chart: Chart) -> str:
    return f'<div class="card"><h3>{escape(chart.title)}</h3>{draw(chart, 420, 260)}</div>'
