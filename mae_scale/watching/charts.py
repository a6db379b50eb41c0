"""Charts of a run's curves as SVG; the page sets font and colour of their text."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Values = npt.NDArray[np.float64]

WIDTH, HEIGHT = 420, 260  # size in pixels at which text has its natural size
BINS = 400  # largest number of points of a curve
FEW = 40  # largest number of points of a curve that are marked one by one
FEW_STARTS = 12  # largest number of lines at restarts that cross the whole chart
_GREY = "#80808055"  # colour of the grid, on light and dark ground
_RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11}


@dataclass
class Curve:
    """Values of one run, x and y float64 [n]; a NaN in y leaves a gap."""

    x: Values
    y: Values
    colour: str
    dashed: bool = False


def thin(x: Values, y: Values, bins: int = BINS) -> tuple[Values, Values, Values, Values]:
    """Divide a long curve into bins of consecutive points.

    Args:
        x, y: float64 [n], n at least 1; y may hold NaN, which does not count.
        bins: largest number of bins; a curve with fewer points keeps them all.

    Returns:
        For each bin the mean of x, the mean of y, the lowest y and the highest y, each float64
        [at most `bins`]; those of y are NaN where a bin has no value.
    """
    size = -(-len(x) // bins)
    fill = np.full(-len(x) % size, np.nan)
    xs, ys = (np.append(values, fill).reshape(-1, size) for values in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of bins without a value
        return np.nanmean(xs, 1), np.nanmean(ys, 1), np.nanmin(ys, 1), np.nanmax(ys, 1)


def moving_mean(y: Values) -> Values:
    """Return the mean of the values around each value, float64 [n]; NaN does not count.

    The mean is over a twentieth of the curve, with as many values on either side; towards the ends
    it is over fewer values.
    """
    n, half = len(y), len(y) // 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of windows without a value
        halves = (min(half, i, n - 1 - i) for i in range(n))
        return np.array([np.nanmean(y[i - h : i + h + 1]) for i, h in enumerate(halves)])


@matplotlib.rc_context(_RC)
def draw(
    curves: list[Curve],
    x_label: str,
    x_end: float,
    marks: list[tuple[float, str]],
    scale: Literal["auto", "zero", "percent"] = "auto",
    smooth: bool = False,
) -> str:
    """Draw curves over a common axis from 0 as an `<svg>` element that fills its place.

    Args:
        curves: curves to draw.
        x_label: label of the axis.
        x_end: end of the axis, the same in all charts of a task.
        marks: vertical lines: place on the axis, and colour.
        scale: scale of the values. auto: logarithmic where they are positive and span a factor over
            5, linear otherwise; zero: linear from 0; percent: linear from 0, for shares up to 1.
        smooth: whether to draw a moving mean, with the values faintly behind it.
    """
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        if len(curve.x):
            _draw_curve(axes, curve, smooth)
    top = 1 if len(marks) <= FEW_STARTS else 0.05  # many long lines would hide the curves
    for x, colour in marks:
        axes.axvline(x, 0, top, color=colour, linestyle=(0, (2, 3)), linewidth=1, alpha=0.7)
    _set_scale(axes, scale, np.concatenate([curve.y for curve in curves]))
    axes.set_xlim(-0.02 * x_end, 1.02 * x_end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.set_xlabel(x_label)
    axes.tick_params(which="both", length=0)
    axes.grid(color=_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    stream = io.StringIO()
    about: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure)
    figure.savefig(stream, format="svg", transparent=True, metadata=about)
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _draw_curve(axes: Any, curve: Curve, smooth: bool) -> None:
    x, mean, low, high = thin(curve.x, curve.y)
    few = np.isfinite(mean).sum() <= FEW
    if smooth and len(curve.x) > BINS:
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.18, linewidth=0)
    elif smooth:
        axes.plot(x, mean, color=curve.colour, alpha=0.3, linewidth=1)
    axes.plot(
        x, moving_mean(mean) if smooth else mean, color=curve.colour, linewidth=1.6,
        linestyle="--" if curve.dashed else "-", marker="o" if few else None, markersize=3.5,
    )  # fmt: skip


def _set_scale(axes: Any, scale: str, values: Values) -> None:
    finite = values[np.isfinite(values)]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if scale == "auto" and 0 < 5 * lowest < highest:
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


def short(value: float) -> str:
    """Write a number for an axis, such as 250, 12k, 1.5M, 2e-05."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.4g}"
