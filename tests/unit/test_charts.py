"""The way from a run's rows to a curve."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mae_scale.watching.charts import Curve, draw, moving_mean, short, thin
from mae_scale.watching.health import duration


def test_a_long_curve_keeps_its_means_and_extremes() -> None:
    x = np.arange(1, 100_001, dtype=float)
    y = np.sin(x / 9000)
    y[31_234], y[70_000], y[50_000] = 50, -50, np.nan
    places, mean, low, high = thin(x, y, bins=500)
    assert len(places) == len(mean) == 500
    assert np.average(places) == pytest.approx(x.mean())
    assert len(thin(x[:501], y[:501], bins=500)[0]) == 251
    assert high.max() == 50 and low.min() == -50 and np.isfinite(mean).all()
    smooth = np.setdiff1d(np.arange(500), [31_234 // 200, 70_000 // 200])
    np.testing.assert_allclose(mean[smooth], np.sin(places / 9000)[smooth], atol=1e-3)


def test_a_short_curve_stays_as_it_is() -> None:
    x, y = np.arange(3.0), np.array([1.0, np.nan, 3.0])
    for values in thin(x, y)[1:]:
        np.testing.assert_array_equal(values, y)
    np.testing.assert_array_equal(thin(x, y)[0], x)


def test_the_moving_mean_keeps_the_ends_and_straight_lines() -> None:
    line = np.linspace(5, 1, 400)
    np.testing.assert_allclose(moving_mean(line), line)
    line[200] = np.nan
    assert moving_mean(line)[200] == pytest.approx(3, abs=0.02)
    assert np.isnan(moving_mean(np.full(4, np.nan))).all()


@pytest.mark.parametrize("values", [[], [0.5], [np.nan, np.nan], [0, 0, 0], [3, np.nan, 1e-9]])
@pytest.mark.parametrize("scale", ["auto", "zero", "percent"])
def test_any_values_can_be_drawn(values: list[float], scale: str) -> None:
    curve = Curve(np.arange(float(len(values))), np.array(values, float), "#123456")

    def drawn() -> str:
        return draw([curve], "step", 5, [(0, "#123456")], scale, smooth=True)  # type: ignore[arg-type]

    assert drawn() == drawn()
    assert drawn().startswith("<svg")


def test_points_are_marked_where_they_are_few() -> None:
    for count, marked in ((9, 9), (300, 0)):
        x = np.arange(float(count))
        svg = draw([Curve(x, x, "#123456")], "step", 300, [])
        assert len(re.findall("<use [^>]*fill: #123456", svg)) == marked


def test_numbers_and_durations_read_well() -> None:
    numbers = [0, 0.25, 250, 9999, 12_000, 1_500_000, 2e-5]
    assert [short(n) for n in numbers] == ["0", "0.25", "250", "9999", "12k", "1.5M", "2e-05"]
    seconds = [-1, 0.4, 59, 60, 200, 3600, 18_720, 86_400, 273_600]
    assert [duration(s) for s in seconds] == [
        "0 s", "0 s", "59 s", "1 min", "3 min 20 s", "1 h", "5 h 12 min", "1 d", "3 d 4 h",
    ]  # fmt: skip
