"""Tables: the scores of all runs, their means over seeds, and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rcm.evaluation.page.collect import ABSENT, Run
from rcm.evaluation.page.html import Markup, element, joined, number
from rcm.evaluation.page.references import distinct_teachers, real_rows
from rcm.evaluation.page.scores import METRICS, Metric, Row
from rcm.training.run_folder import ANY_RANKS

FACTS = ("Method", "Seed", "Iterations", "Steps", "Evaluations")


def score_table(runs: Sequence[Run]) -> Markup:
    """A row for each run and number of steps, which a click on a column's head sorts."""
    students = [(run, row) for run in runs for row in run.students]
    best = {m.name: _best(m, [row for _, row in students]) for m in METRICS}
    rows = [
        element("tr", *_facts_of(run, row), *(_score(m, row, best[m.name]) for m in METRICS))
        for run, row in students
    ]
    heads = [_sortable(title) for title in ("Run", "Method")]
    heads += [_sortable(title, class_="n") for title in FACTS[1:]]
    heads += [_sortable(m.heading, class_="n", descends=m.best == "highest") for m in METRICS]
    return scrollable(
        "Scores of all runs",
        element(
            "table",
            element("thead", element("tr", *heads)),
            element("tbody", *rows),
            element("tbody", *_references(runs), class_="references"),
            class_="sortable",
        ),
    )


def _facts_of(run: Run, row: Row) -> list[Markup]:
    return [
        _name(run.label, run),
        element("td", run.method),
        *(element("td", text, class_="n") for text in (run.seed, run.iterations)),
        _steps(row, run.schedule(row)),
        _cell(row.evaluations),
    ]


def _references(runs: Sequence[Run]) -> list[Markup]:
    """Rows of the real data and of each teacher with the most steps, which are not sorted."""
    named = [("real data", row) for row in real_rows(runs)]
    named += [
        (name, max(rows, key=lambda row: row.steps or 0)) for name, rows in distinct_teachers(runs)
    ]
    return [
        element(
            "tr",
            _name(name, columns=len(FACTS) - 1),
            *(_cell(value) for value in (row.steps, row.evaluations)),
            *(_score(m, row, None) for m in METRICS),
        )
        for name, row in named
    ]


def teacher_table(runs: Sequence[Run]) -> Markup | None:
    """All scores of the teachers, or None if there are none."""
    rows = [
        element(
            "tr",
            _name(name),
            *(_cell(value) for value in (row.steps, row.evaluations)),
            *(_score(m, row, None) for m in METRICS),
        )
        for name, rows in distinct_teachers(runs)
        for row in rows
    ]
    heads = ("Steps", "Evaluations", *(m.heading for m in METRICS))
    return _table("Scores of the teachers", "Teacher", heads, rows) if rows else None


def seed_table(runs: Sequence[Run]) -> Markup | None:
    """Means over finished runs that differ only in their seed, or None if there are none."""
    rows = []
    for group in sorted({run.group for run in runs}):
        members = [run for run in runs if run.group == group and run.finished]
        found: dict[tuple[int | None, tuple[float, ...] | None], list[tuple[Run, Row]]] = {}
        for run in members:
            for row in run.students:
                found.setdefault((row.steps, row.mid_times), []).append((run, row))
        rows += [_mean_row(alike) for alike in found.values() if len(alike) > 1]
    heads = ("Seeds", "Steps", *(m.heading for m in METRICS))
    return _table("Means over seeds", "Runs", heads, rows) if rows else None


def _mean_row(found: Sequence[tuple[Run, Row]]) -> Markup:
    """The means of the rows of several runs with the same steps and mid times."""
    scores = [row for _, row in found]
    return element(
        "tr",
        _name(", ".join(run.label for run, _ in found), found[0][0]),
        element("td", ", ".join(run.seed for run, _ in found), class_="n"),
        _steps(found[0][1], found[0][0].schedule(found[0][1])),
        *(element("td", _mean(m, scores), class_="n") for m in METRICS),
    )


def _table(label: str, first: str, heads: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """A table of numbers; the first column names them."""
    cells = [
        element("th", first, scope="col"),
        *(element("th", head, class_="n", scope="col") for head in heads),
    ]
    head = element("thead", element("tr", *cells))
    return scrollable(label, element("table", head, element("tbody", *rows)))


def _mean(metric: Metric, rows: Sequence[Row]) -> str:
    values = [value for row in rows if (value := row.metric(metric.name)) is not None]
    if len(values) < len(rows):
        return ABSENT
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{metric.decimals}f} ± {half:.{metric.decimals}f}"


def settings_table(runs: Sequence[Run], *, of_all: bool) -> Markup | None:
    """Settings and versions that differ, or None if there are none.

    of_all: those that every run has, or else those that only some of them have.
    """
    columns = [_everything(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [_shown(column.get(name, ABSENT)) for column in columns]
        if len(set(values)) > 1 and all(name in column for column in columns) == of_all:
            cells = (element("td", value) for value in values)
            rows.append(element("tr", _setting(name), *cells))
    if not rows:
        return None
    heads = ["Setting", *(run.label for run in runs)]
    return scrollable(
        "Settings that differ" if of_all else "Settings of some runs",
        element(
            "table",
            element("thead", element("tr", *(element("th", head, scope="col") for head in heads))),
            element("tbody", *rows),
        ),
    )


def common_settings(runs: Sequence[Run]) -> Markup:
    """The settings and versions that all runs have in common, as a list."""
    columns = [_everything(run) for run in runs]
    common = {
        name: value
        for name, value in columns[0].items()
        if all(name in column and column[name] == value for column in columns)
    }
    rows = [
        element("tr", _setting(name), element("td", _shown(value)))
        for name, value in common.items()
    ]
    return scrollable("Settings in common", element("table", element("tbody", *rows)))


def _setting(name: str) -> Markup:
    """The head of a setting's row."""
    return element("th", element("code", name, class_="name"), scope="row")


def _everything(run: Run) -> dict[str, Any]:
    """Settings and versions; of how ranks shared the work, only what differs is of interest."""
    torch = {"torch": run.facts["torch"]} if "torch" in run.facts else {}
    settings = {name: value for name, value in run.settings.items() if name not in ANY_RANKS}
    ranks = {name: value for name, value in run.settings.items() if name in ANY_RANKS}
    return settings | torch | ranks


def scrollable(label: str, content: Markup) -> Markup:
    """Content that scrolls sideways on a narrow screen, with the keyboard too."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def _name(name: str, run: Run | None = None, *, columns: int | None = None) -> Markup:
    """The head of a row, with the color of a run."""
    style = None if run is None else f"dot c{run.color}"
    dot = style and element("span", class_=style, aria_hidden="true")
    return element("th", dot, element("span", name, class_="name"), scope="row", colspan=columns)


def _sortable(title: str, *, class_: str | None = None, descends: bool = False) -> Markup:
    """A column's head; descends: whether the first click sorts the largest values to the top."""
    button = element("button", title, type="button", data_descends=descends)
    return element("th", button, class_=class_, scope="col", aria_sort="none")


def _best(metric: Metric, rows: Sequence[Row]) -> str | None:
    """The best value as it is shown, if there are several."""
    values = [value for row in rows if (value := row.metric(metric.name)) is not None]
    return number(min(values, key=metric.cost), metric.decimals) if len(values) > 1 else None


def _score(metric: Metric, row: Row, best: str | None) -> Markup:
    value = row.metric(metric.name)
    shown = number(value, metric.decimals)
    is_best = shown == best
    content = joined([element("strong", shown), element("span", " best", class_="spoken")])
    return element("td", content if is_best else shown, class_="n", data_value=_exact(value))


def _steps(row: Row, schedule: str) -> Markup:
    """The number of steps, with the mid times where others have the same number."""
    shown = number(row.steps, 0) + (f" ({schedule})" if schedule else "")
    return element("td", shown, class_="n", data_value=_exact(row.steps))


def _cell(value: int | None) -> Markup:
    return element("td", number(value, 0), class_="n", data_value=_exact(value))


def _exact(value: float | None) -> str | None:
    return None if value is None else repr(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
