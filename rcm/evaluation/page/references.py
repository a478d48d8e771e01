"""What students are compared with: the real data and the teachers, each once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rcm.evaluation.page.collect import Run
from rcm.evaluation.page.html import counted
from rcm.evaluation.page.scores import REAL, Row

NAMED = 4  # runs of a teacher that its name lists


def distinct_teachers(runs: Sequence[Run]) -> list[tuple[str, tuple[Row, ...]]]:
    """Teachers with different scores, by name: several runs may have the same teacher."""
    found: list[tuple[tuple[Row, ...], list[str]]] = []
    for run in runs:
        if run.teachers:
            _add(found, run.teachers, run.label)
    return [(teacher_name(labels, alone=len(found) == 1), rows) for rows, labels in found]


def teacher_name(labels: Sequence[str], *, alone: bool) -> str:
    """The teacher of runs with these labels; alone: it is the only one."""
    if alone:
        return "teacher"
    others = len(labels) - NAMED
    rest = f" and {counted(others, 'other run')}" if others > 0 else ""
    return f"teacher of {', '.join(labels[:NAMED])}{rest}"


def real_rows(runs: Sequence[Run]) -> list[Row]:
    """The different scores of real data."""
    found: list[tuple[tuple[Row, ...], list[str]]] = []
    for run in runs:
        for row in run.rows:
            if row.network == REAL:
                _add(found, (row,), run.label)
    return [row for (row,), _ in found]


def _add(found: list[tuple[tuple[Row, ...], list[str]]], rows: tuple[Row, ...], label: str) -> None:
    """Add rows, or their label to the same rows; an evaluation has more of them than a report."""
    for place, (others, labels) in enumerate(found):
        if _same(rows, others):
            labels.append(label)
            found[place] = (max(others, rows, key=_measured), labels)
            return
    found.append((rows, [label]))


def _same(rows: tuple[Row, ...], others: tuple[Row, ...]) -> bool:
    """Whether rows of the same number of steps, of which there must be some, have the same FD."""
    distances = {row.steps: row.frechet_distance for row in rows}
    pairs = [
        (row.frechet_distance, distances[row.steps]) for row in others if row.steps in distances
    ]
    return bool(pairs) and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6))
        for a, b in pairs
    )


def _measured(rows: tuple[Row, ...]) -> int:
    return sum(value is not None for row in rows for value in vars(row).values())
