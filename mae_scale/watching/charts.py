"""Charts as SVG for a page: matplotlib draws them, and the page's style sets fonts and colours.

Text and grid have the colours of the page's variables --ink and --line, so that they follow a dark
theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Values = npt.NDArray[np.float64]

BINS = 400  # largest number of points of a curve
FEW = 12  # largest number of marks that cross the whole chart
_INK, _LINE = "#010203", "#040506"  # placeholders, which the page's variables replace
_THEME = {_INK: "var(--ink)", _LINE: "var(--line)"}
_RC: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}


@dataclass
class Curve:
    """Values of one run, x and y float64 [n]; a NaN in y leaves a gap."""

    x: Values
    y: Values
    colour: str
    dashed: bool = False


@dataclass
class Chart:
    """Curves over a common axis."""

    title: str
    curves: list[Curve]
    x_label: str
    x_end: float
    """End of the axis, which begins at 0, so that the charts of a page have the same axis."""
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Vertical lines: place on the axis, and colour."""
    scale: Literal["auto", "zero", "percent"] = "auto"
    """Scale of the values. auto: logarithmic where they are positive and span a factor over 5,
    linear otherwise; zero: linear from 0; percent: linear from 0, for shares from 0 to 1."""
    smooth: bool = False
    """Whether to draw a moving mean, with the values faintly behind it."""


def thin(x: Values, y: Values, bins: int = BINS) -> tuple[Values, Values, Values, Values]:
    """Divide a long curve into bins of consecutive points.

    Args:
        x, y: float64 [n]; y may hold NaN, which does not count.
        bins: largest number of bins; a curve with fewer points keeps them all.

    Returns:
        For each bin the mean of x, the mean of y, the lowest y and the highest y, each float64
        [at most `bins`]; those of y are NaN where a bin has no value.
    """
    n = len(x)
    starts = np.unique(np.arange(bins) * n // bins) if n > bins else np.arange(n)
    finite = np.isfinite(y)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, y, 0.0), starts)
    with np.errstate(invalid="ignore"):
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    low = np.fmin.reduceat(np.where(finite, y, np.nan), starts)
    high = np.fmax.reduceat(np.where(finite, y, np.nan), starts)
    sizes = np.diff(np.append(starts, n))
    return np.add.reduceat(x, starts) / sizes, mean, low, high


def moving_mean(y: Values) -> Values:
    """Return the mean of the values around each value, float64 [n]; NaN does not count.

    The mean is over a twentieth of the curve, with as many values on either side; towards the ends
    it is over fewer values.
    """
    i = np.arange(len(y))
    half = np.minimum(len(y) // 40, np.minimum(i, i[::-1]))
    finite = np.isfinite(y)
    total = np.append(0, np.cumsum(np.where(finite, y, 0.0)))
    count = np.append(0, np.cumsum(finite))
    first, last = i - half, i + half + 1
    n = count[last] - count[first]
    return np.where(n > 0, (total[last] - total[first]) / np.maximum(n, 1), np.nan)


def draw(chart: Chart, width: int, height: int) -> str:
    """Draw a chart as an `<svg>` element that fills the width of its place on the page.

    Args:
        chart: chart to draw.
        width, height: size in pixels at which text has its natural size.
    """
    with matplotlib.rc_context({**_RC, "svg.hashsalt": f"{chart.title} {width}"}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        lowest, highest = np.inf, -np.inf
        for curve in chart.curves:
            _draw_curve(axes, curve, chart.smooth)
            finite = curve.y[np.isfinite(curve.y)]
            if finite.size:
                lowest, highest = min(lowest, finite.min()), max(highest, finite.max())
        for x, colour in chart.marks:
            top = 1 if len(chart.marks) <= FEW else 0.05  # many long lines would hide the curves
            axes.axvline(x, 0, top, color=colour, linestyle=(0, (2, 3)), linewidth=1, alpha=0.7)
        _set_scale(axes, chart.scale, lowest, highest)
        _style(axes, chart.x_label)
        axes.set_xlim(-0.02 * chart.x_end, 1.02 * chart.x_end)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure)
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)


def _draw_curve(axes: Axes, curve: Curve, smooth: bool) -> None:
    if not len(curve.x):
        return
    x, mean, low, high = thin(curve.x, curve.y)
    style: dict[str, Any] = {
        "color": curve.colour,
        "linewidth": 1.6,
        "linestyle": "--" if curve.dashed else "-",
    }
    if smooth and len(curve.x) > BINS:
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.18, linewidth=0)
    elif smooth:
        axes.plot(x, mean, color=curve.colour, alpha=0.3, linewidth=1)
    line = moving_mean(mean) if smooth else mean
    axes.plot(x, line, marker="o" if np.isfinite(line).sum() < 2 else None, markersize=4, **style)


def _set_scale(axes: Axes, scale: str, lowest: float, highest: float) -> None:
    if scale == "auto" and lowest > 0 and highest > 5 * lowest and np.isfinite(highest):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if scale != "auto":
            axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
    percent = scale == "percent"
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{100 * y:.3g} %" if percent else short(y))
    )


def _style(axes: Axes, x_label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.set_xlabel(x_label, color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.tick_params(which="minor", length=0)
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)


def short(value: float) -> str:
    """Write a number for an axis, such as 250, 12k, 1.5M, 2e-05."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (letter == "M" and abs(value) >= size):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def spread(values: Sequence[int], most: int) -> list[int]:
    """Choose at most `most` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
