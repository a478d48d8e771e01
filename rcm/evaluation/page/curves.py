"""Figures of quantities over the training: one for each quantity, with a line for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rcm.evaluation.page.axes import Axis, band, frame, path
from rcm.evaluation.page.collect import Run
from rcm.evaluation.page.html import Markup, element, joined
from rcm.evaluation.page.metrics_file import Curve
from rcm.evaluation.page.quantities import QUANTITIES, Quantity

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 50.0, 372.0, 8.0, 192.0


def curve_figures(runs: Sequence[Run]) -> list[Markup]:
    """A figure for each quantity that a run has."""
    x = Axis.over((0, *(run.metrics.iteration for run in runs)), LEFT, RIGHT, margin=0.01)
    figures = []
    for quantity in QUANTITIES:
        if lines := [(run, c) for run in runs if (c := run.metrics.curves.get(quantity.name))]:
            figures.append(_figure(quantity, lines, x, f"clip-{runs[0].number}-{quantity.name}"))
    return figures


def _figure(quantity: Quantity, lines: list[tuple[Run, Curve]], x: Axis, clip: str) -> Markup:
    limits = [(run, run.metrics.limit) for run, _ in lines if quantity.limit]
    values = [value for _, curve in lines for value in curve.middle]
    if quantity.logarithmic:  # of a linear axis, one extreme value would take all the room
        values += [value for _, curve in lines for value in curve.high]
    values += [limit for _, limit in limits if limit is not None]
    y = Axis.over(values, BOTTOM, TOP, logarithmic=quantity.logarithmic)
    area = element("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP)
    drawn = [_limit(run, limit, x, y) for run, limit in limits if limit is not None]
    svg = element(
        "svg",
        element("clipPath", area, id=clip),
        frame(x, y, "iteration"),
        element("g", *drawn, *(_line(*line, x, y) for line in lines), clip_path=f"url(#{clip})"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=_described(quantity, lines),
        data_x=x.described(),
        data_y=y.described(),
    )
    caption = element("figcaption", element("strong", quantity.title), f" {quantity.meaning}")
    return element("figure", caption, svg, class_="plot")


def _line(run: Run, curve: Curve, x: Axis, y: Axis) -> Markup:
    style = f"c{run.color} d{run.dash}"
    columns = list(zip(curve.iterations, curve.low, curve.high, strict=True))
    spread = element("path", class_="band", d=band(columns, x, y)) if curve.thinned else None
    points = list(zip(curve.iterations, curve.middle, strict=True))
    line = element("path", class_="line", d=path(points, x, y))
    return element("g", spread, line, class_=style, data_run=run.number)


def _limit(run: Run, limit: float, x: Axis, y: Axis) -> Markup:
    at = y.place(limit)
    line = element("line", class_="limit", x1=x.start, x2=x.end, y1=at, y2=at)
    return element("g", line, class_=f"c{run.color}", data_run=run.number)


def _described(quantity: Quantity, lines: list[tuple[Run, Curve]]) -> str:
    ends = []
    for run, curve in lines:
        finite = [value for value in curve.middle if math.isfinite(value)]
        if finite:
            ends.append(f"{run.label} from {finite[0]:.3g} to {finite[-1]:.3g}")
    return f"{quantity.title} over the iterations: {', '.join(ends)}"


def legend(runs: Sequence[Run], key: str) -> Markup:
    """A button for each run, and for the teachers, which hides its marks in the figures."""
    buttons = [_button(run.label, str(run.number), _swatch(run)) for run in runs]
    if any(run.teachers for run in runs):
        swatch = (
            element("path", class_="line", d="M1,7H29"),
            element("circle", class_="marker", cx=15, cy=7, r=4),
        )
        icon = element("svg", *swatch, viewBox="0 0 30 14", class_="teacher", aria_hidden="true")
        buttons.append(_button("teacher", f"teacher-{key}", icon))
    return element("div", *buttons, class_="legend", role="group", aria_label="Show or hide runs")


def _swatch(run: Run) -> Markup:
    parts = (element("path", class_="line", d="M1,7H29"), marker(run.dash, 15, 7))
    style = f"c{run.color} d{run.dash}"
    return element("svg", *parts, viewBox="0 0 30 14", class_=style, aria_hidden="true")


def _button(label: str, toggles: str, icon: Markup) -> Markup:
    return element(
        "button",
        joined([icon, element("span", label)]),
        type="button",
        aria_pressed="true",
        data_toggle=toggles,
    )


def marker(shape: int, x: float, y: float, title: str | None = None) -> Markup:
    """A circle, square, diamond or triangle around a point, with a tooltip."""
    tooltip = None if title is None else element("title", title)
    if shape == 0:
        return element("circle", tooltip, class_="marker", cx=x, cy=y, r=4)
    corners = {
        1: ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        2: ((0.0, -5.2), (5.2, 0.0), (0.0, 5.2), (-5.2, 0.0)),
        3: ((0.0, -5.0), (4.8, 3.6), (-4.8, 3.6)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return element("polygon", tooltip, class_="marker", points=points)
