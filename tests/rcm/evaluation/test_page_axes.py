"""Axes of the figures of rcm.report: where values lie, and which are ticks."""

import math

import pytest

from rcm.evaluation.page.axes import Axis


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 1000.0],
        [0.3, 0.31],
        [2.0],
        [1e-8, 1e8],
        [1.19, 32.0],
        [5.0, math.nan, math.inf, 7.0],
        [],
    ],
    ids=str,
)
def test_an_axis_covers_finite_values_with_some_ticks(
    values: list[float], logarithmic: bool
) -> None:
    axis = Axis.over(values, 200.0, 10.0, logarithmic=logarithmic)
    finite = [value for value in values if math.isfinite(value)]
    assert all(10 < axis.place(value) < 200 for value in finite)
    assert axis.place(axis.low) == pytest.approx(200)
    assert axis.place(axis.high) == pytest.approx(10)
    assert 2 <= len(axis.ticks) <= 7
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_equal_ratios_are_equally_long_on_a_logarithmic_axis() -> None:
    axis = Axis.over([1.0, 1000.0], 0.0, 300.0, logarithmic=True)
    assert axis.ticks == (1, 10, 100, 1000)
    one, ten, hundred, thousand = map(axis.place, axis.ticks)
    assert ten - one == pytest.approx(hundred - ten) == pytest.approx(thousand - hundred)


def test_a_logarithmic_axis_covers_the_positive_values() -> None:
    axis = Axis.over([-3.0, 0.0, 2.0, 20.0], 200.0, 10.0, logarithmic=True)
    assert axis.logarithmic
    assert axis.low > 1
    assert axis.place(0.0) > 200  # below the figure
    assert not Axis.over([-3.0, 0.0], 200.0, 10.0, logarithmic=True).logarithmic
