"""Figures of quality against network evaluations: the Fréchet distance, then the other metrics."""

from __future__ import annotations

from collections.abc import Sequence

from rcm.evaluation.page.axes import Axis, frame, path
from rcm.evaluation.page.collect import Run
from rcm.evaluation.page.curves import marker
from rcm.evaluation.page.html import Markup, element
from rcm.evaluation.page.scores import METRICS, REAL, Metric, Row

# Width, height and the rectangle between the axes: of the first figure, and of the others.
LARGE = (760, 380, 52.0, 744.0, 12.0, 334.0)
SMALL = (380, 230, 50.0, 372.0, 8.0, 192.0)


def quality_figures(runs: Sequence[Run], key: str) -> list[Markup]:
    """A figure for each metric that a row has; the key is that of the teachers' button."""
    return [
        figure
        for place, metric in enumerate(METRICS)
        if (figure := _figure(metric, runs, key, large=place == 0)) is not None
    ]


def distinct_teachers(runs: Sequence[Run]) -> list[tuple[str, tuple[Row, ...]]]:
    """Teachers with different scores and the runs that have them: runs may share a teacher."""
    found: dict[tuple[Row, ...], list[str]] = {}
    for run in runs:
        if run.teachers:
            found.setdefault(run.teachers, []).append(run.label)
    many = len(found) > 1
    return [
        (f"teacher of {', '.join(labels)}" if many else "teacher", rows)
        for rows, labels in found.items()
    ]


def real_rows(runs: Sequence[Run]) -> list[Row]:
    """The scores of real data, each once."""
    return list(dict.fromkeys(row for run in runs for row in run.rows if row.network == REAL))


def _points(rows: Sequence[Row], metric: Metric) -> list[tuple[int, float, Row]]:
    """Evaluations and values of the rows that have both."""
    found = [
        (row.evaluations, value, row)
        for row in rows
        if row.evaluations is not None and (value := row.metric(metric.name)) is not None
    ]
    return sorted(found, key=lambda point: point[0])


def _figure(metric: Metric, runs: Sequence[Run], key: str, *, large: bool) -> Markup | None:
    width, height, left, right, top, bottom = LARGE if large else SMALL
    students = [(run, points) for run in runs if (points := _points(run.students, metric))]
    teachers = [
        (name, points)
        for name, rows in distinct_teachers(runs)
        if (points := [p for p in _points(rows, metric) if not _trivial(metric, p)])
    ]
    baselines = [v for row in real_rows(runs) if (v := row.metric(metric.name)) is not None]
    if not students:
        return None
    everything = [point for _, points in (*students, *teachers) for point in points]
    evaluations = [point[0] for point in everything]
    values = [*(point[1] for point in everything), *baselines]
    powers = [2.0**power for power in range(max(evaluations).bit_length() + 1)]
    x = Axis.over(evaluations, left, right, logarithmic=True, margin=0.04, ticks=powers)
    logarithmic = metric.best == "lowest" and metric.name == METRICS[0].name
    y = Axis.over(values, bottom, top, logarithmic=logarithmic, margin=0.07)
    svg = element(
        "svg",
        frame(x, y, "network evaluations per sample"),
        *(_baseline(value, x, y, first=place == 0) for place, value in enumerate(baselines)),
        *(_teacher(*teacher, metric, x, y, key, labelled=large) for teacher in teachers),
        *(_student(*student, metric, x, y) for student in students),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_described(metric, students, teachers, baselines),
    )
    caption = element("figcaption", element("strong", metric.heading))
    return element("figure", caption, svg, class_="plot large" if large else "plot")


def _trivial(metric: Metric, point: tuple[int, float, Row]) -> bool:
    """The difference of the teacher's reference to itself."""
    return metric.name == "same_noise_rmse" and point[1] == 0


def _baseline(value: float, x: Axis, y: Axis, *, first: bool) -> Markup:
    at = y.place(value)
    line = element("line", class_="baseline", x1=x.start, x2=x.end, y1=at, y2=at)
    name = element("text", "real data", class_="end", x=x.end - 2, y=at - 6) if first else None
    return element("g", line, name)


def _teacher(
    name: str,
    points: list[tuple[int, float, Row]],
    metric: Metric,
    x: Axis,
    y: Axis,
    key: str,
    *,
    labelled: bool,
) -> Markup:
    places = [(x.place(count), y.place(value)) for count, value, _ in points]
    line = element("path", class_="line", d=path([point[:2] for point in points], x, y))
    markers = [
        marker(0, *place, _title(name, metric, point))
        for place, point in zip(places, points, strict=True)
    ]
    labels = [
        element("text", f"Heun {row.steps}", class_="label", x=across, y=up - 10)
        for (across, up), (_, _, row) in zip(places, points, strict=True)
        if labelled
    ]
    return element("g", line, *markers, *labels, class_="teacher", data_run=f"teacher-{key}")


def _student(
    run: Run, points: list[tuple[int, float, Row]], metric: Metric, x: Axis, y: Axis
) -> Markup:
    line = element("path", class_="line", d=path([point[:2] for point in points], x, y))
    markers = [
        marker(run.dash, x.place(p[0]), y.place(p[1]), _title(run.label, metric, p)) for p in points
    ]
    return element("g", line, *markers, class_=f"c{run.color} d{run.dash}", data_run=run.number)


def _title(name: str, metric: Metric, point: tuple[int, float, Row]) -> str:
    count, value, row = point
    return (
        f"{name}, {row.steps} steps, {count} evaluations: {metric.title} {value:.{metric.digits}f}"
    )


def _described(
    metric: Metric,
    students: list[tuple[Run, list[tuple[int, float, Row]]]],
    teachers: list[tuple[str, list[tuple[int, float, Row]]]],
    baselines: list[float],
) -> str:
    series = [*((run.label, points) for run, points in students), *teachers]
    parts = [
        f"{name}: {', '.join(f'{v:.{metric.digits}f} at {count}' for count, v, _ in points)}"
        for name, points in series
    ]
    parts += [f"real data: {value:.{metric.digits}f}" for value in baselines]
    return f"{metric.title} against network evaluations. {'; '.join(parts)}"
