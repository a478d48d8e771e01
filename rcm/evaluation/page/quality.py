"""Figures of quality against network evaluations: the Fréchet distance, then the other metrics."""

from __future__ import annotations

from collections.abc import Sequence

from rcm.evaluation.page.axes import Axis, frame, path
from rcm.evaluation.page.collect import Run
from rcm.evaluation.page.curves import marker
from rcm.evaluation.page.html import Markup, counted, element
from rcm.evaluation.page.references import distinct_teachers, real_rows
from rcm.evaluation.page.scores import METRICS, Metric, Row

# Width, height and the rectangle between the axes: of the first figure, and of the others.
LARGE = (760, 490, 52.0, 752.0, 12.0, 444.0)
LABEL = (50, 18)  # the room of a label
SMALL = (380, 230, 50.0, 372.0, 8.0, 192.0)

Point = tuple[int, float, Row]
"""Evaluations, value and the row that has them."""


def quality_figures(runs: Sequence[Run], key: str) -> list[Markup]:
    """A figure for each metric that a row has; the key is that of the teachers' button."""
    return [
        figure
        for place, metric in enumerate(METRICS)
        if (figure := _figure(metric, runs, key, large=place == 0)) is not None
    ]


def _points(rows: Sequence[Row], metric: Metric) -> list[Point]:
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
    evaluations = [row.evaluations for run in runs for row in run.rows if row.evaluations]
    values = [*(point[1] for point in everything), *baselines]
    powers = [2.0**power for power in range(max(evaluations).bit_length() + 1)]
    x = Axis.over(evaluations, left, right, logarithmic=True, margin=0.04, ticks=powers)
    logarithmic = metric.best == "lowest" and metric.name == METRICS[0].name
    y = Axis.over(values, bottom, top, logarithmic=logarithmic, margin=0.07)
    svg = element(
        "svg",
        frame(x, y, "network evaluations per sample"),
        *(_baseline(value, x, y, first=place == 0) for place, value in enumerate(baselines)),
        *(_teacher(*teacher, metric, x, y, key) for teacher in teachers),
        _teacher_labels([p for _, ps in teachers for p in ps], x, y, key) if large else None,
        *(_student(*student, metric, x, y) for student in students),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_described(metric, students, teachers, baselines),
    )
    caption = element("figcaption", element("strong", metric.heading))
    return element("figure", caption, svg, class_="plot large" if large else "plot")


def _trivial(metric: Metric, point: Point) -> bool:
    """The difference of the teacher's reference to itself."""
    return metric.name == "same_noise_rmse" and point[1] == 0


def _baseline(value: float, x: Axis, y: Axis, *, first: bool) -> Markup:
    at = y.place(value)
    line = element("line", class_="baseline", x1=x.start, x2=x.end, y1=at, y2=at)
    name = element("text", "real data", class_="end", x=x.end - 2, y=at - 6) if first else None
    return element("g", line, name)


def _teacher(name: str, points: list[Point], metric: Metric, x: Axis, y: Axis, key: str) -> Markup:
    line = element("path", class_="line", d=path([point[:2] for point in points], x, y))
    markers = [marker(0, x.place(p[0]), y.place(p[1]), _title(name, metric, p)) for p in points]
    return element("g", line, *markers, class_="teacher", data_run=f"teacher-{key}")


def _teacher_labels(points: list[Point], x: Axis, y: Axis, key: str) -> Markup:
    """The numbers of steps above the teachers' points, where there is room."""
    labels: list[Markup] = []
    places: list[tuple[float, float]] = []
    for count, value, row in points:
        across, up = x.place(count), y.place(value) - 11
        if all(abs(across - a) > LABEL[0] or abs(up - u) > LABEL[1] for a, u in places):
            places.append((across, up))
            labels.append(element("text", f"Heun {row.steps}", class_="label", x=across, y=up))
    return element("g", *labels, data_run=f"teacher-{key}")


def _student(run: Run, points: list[Point], metric: Metric, x: Axis, y: Axis) -> Markup:
    """A line through the first schedule of each number of steps, and markers of all of them."""
    first = {count: value for count, value, _ in reversed(points)}
    line = element("path", class_="line", d=path(sorted(first.items()), x, y))
    markers = []
    for point in points:
        schedule = run.schedule(point[2])
        name = f"{run.label}, mid times {schedule}" if schedule else run.label
        title = _title(name, metric, point)
        markers.append(marker(run.dash, x.place(point[0]), y.place(point[1]), title))
    return element("g", line, *markers, class_=f"c{run.color} d{run.dash}", data_run=run.number)


def _title(name: str, metric: Metric, point: Point) -> str:
    count, value, row = point
    cost = f"{counted(row.steps, 'step')}, {counted(count, 'evaluation')}"
    return f"{name}, {cost}: {metric.title} {value:.{metric.decimals}f}"


def _described(
    metric: Metric,
    students: list[tuple[Run, list[Point]]],
    teachers: list[tuple[str, list[Point]]],
    baselines: list[float],
) -> str:
    series = [*((run.label, points) for run, points in students), *teachers]
    parts = [
        f"{name}: {', '.join(f'{v:.{metric.decimals}f} at {count}' for count, v, _ in points)}"
        for name, points in series
    ]
    parts += [f"real data: {value:.{metric.decimals}f}" for value in baselines]
    return f"{metric.title} against network evaluations. {'; '.join(parts)}"
