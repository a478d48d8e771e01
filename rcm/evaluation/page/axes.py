"""The frame of a figure: two axes with ticks, and where values lie between them, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rcm.evaluation.page.html import Markup, element, joined

# Multiples of powers of ten that become ticks of a logarithmic axis, from few to many.
STEPS = ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)))
MIN_TICKS, MAX_TICKS = 3, 6
FAR = 1e4  # pixels; farther is outside of every figure


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, between two positions in pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        logarithmic: bool = False,
        margin: float = 0.05,
        ticks: Sequence[float] | None = None,
    ) -> Axis:
        """An axis that covers all finite values, with a margin as a fraction of the axis.

        A logarithmic one covers those that are positive; without any it is linear.
        """
        found = [value for value in values if math.isfinite(value)] or [1.0]
        logarithmic = logarithmic and max(found) > 0
        if logarithmic:
            found = [value for value in found if value > 0]
        low, high = min(found), max(found)
        if logarithmic:
            space = margin * math.log(high / low) or math.log(1.2)
            low, high = low / math.exp(space), high * math.exp(space)
        else:
            space = margin * (high - low) or abs(high) * 0.1 or 1.0
            low, high = low - space, high + space
        chosen = ticks or (_logarithmic_ticks(low, high) if logarithmic else _ticks(low, high))
        inside = tuple(tick for tick in chosen if low <= tick <= high)
        return cls(low, high, start, end, logarithmic, inside)

    def place(self, value: float) -> float:
        """The position of a value in pixels."""
        if self.logarithmic:
            part = math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else -1
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(self.start + part * (self.end - self.start), -FAR), FAR)

    def described(self) -> str:
        """For the script: start, end, low, high and whether it is logarithmic."""
        numbers = (self.start, self.end, self.low, self.high, int(self.logarithmic))
        return " ".join(f"{value:.6g}" for value in numbers)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator  # imported late: it is slow

    locator = MaxNLocator(nbins=MAX_TICKS - 1, steps=[1, 2, 2.5, 5, 10])
    return [float(tick) for tick in locator.tick_values(low, high)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(powers) // MAX_TICKS)  # of many decades
    for steps in STEPS:
        ticks = [step * 10.0**power for power in powers[::every] for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= MIN_TICKS:
            return inside if len(inside) <= MAX_TICKS or steps == (1,) else _few(inside)
    return _ticks(low, high)


def _few(ticks: list[float]) -> list[float]:
    """Every second, third, ... tick."""
    return ticks[:: -(-len(ticks) // MAX_TICKS)]


def frame(x: Axis, y: Axis, x_title: str) -> Markup:
    """Grid lines, ticks and the title of the x axis."""
    bottom, parts = y.start, list[str]()
    for tick in y.ticks:
        at = y.place(tick)
        parts.append(element("line", class_="rule", x1=x.start, x2=x.end, y1=at, y2=at))
        parts.append(element("text", f"{tick:g}", class_="y", x=x.start - 6, y=at))
    for tick in x.ticks:
        at = x.place(tick)
        parts.append(element("line", class_="tick", x1=at, x2=at, y1=bottom, y2=bottom + 4))
        parts.append(element("text", f"{tick:g}", class_="x", x=at, y=bottom + 16))
    parts.append(element("line", class_="axis", x1=x.start, x2=x.end, y1=bottom, y2=bottom))
    middle = (x.start + x.end) / 2
    parts.append(element("text", x_title, class_="x title", x=middle, y=bottom + 32))
    return joined(parts)


def path(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    """The path of a line through points; it is interrupted where a value is not finite."""
    words, command = [], "M"
    for across, up in points:
        if math.isfinite(up):
            words.append(f"{command}{x.place(across):.1f},{y.place(up):.1f}")
            command = "L"
        else:
            command = "M"
    return "".join(words)


def band(columns: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> str:
    """The path of the area between low and high of (x, low, high), without those not finite."""
    finite = [column for column in columns if math.isfinite(column[1] + column[2])]
    if not finite:
        return ""
    over = [(across, high) for across, _, high in finite]
    under = [(across, low) for across, low, _ in reversed(finite)]
    return path([*over, *under], x, y) + "Z"
