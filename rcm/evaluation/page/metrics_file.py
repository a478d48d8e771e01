"""metrics.jsonl of a run: the student's curves and its last evaluation."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rcm.errors import RunError
from rcm.evaluation.page.quantities import EVALUATION, ONE_STEP, PER_ITERATION
from rcm.evaluation.page.scores import STUDENT, Row, is_number, row_of_samples

# Points of a curve that are drawn, two or three pixels apart.
BINS = 120
LIMIT = "probe_rmse_limit"

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """A quantity over the iterations: medians of bins, and their least and largest values.

    A bin without a finite value is NaN.
    """

    iterations: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    thinned: bool


@dataclass
class StudentMetrics:
    """What metrics.jsonl says about the student."""

    curves: dict[str, Curve] = field(default_factory=dict)
    limit: float | None = None
    """probe_rmse_limit."""
    iteration: int = 0
    """The last one."""
    rows: tuple[Row, ...] = ()
    """The last evaluation."""
    evaluated: int = 0
    """Its iteration."""
    problems: list[str] = field(default_factory=list)


def read_metrics(path: Path) -> StudentMetrics:
    """Read metrics.jsonl, if it exists; lines that are damaged are left out and counted.

    Raises:
        RunError: it cannot be read.
    """
    metrics, damaged, number = StudentMetrics(), list[int](), 0
    points: dict[str, Points] = defaultdict(list)
    scores: dict[str, Row] = {}
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(file, 1):
                line = _parsed(text)
                if line is None:
                    damaged.append(number)
                elif line["phase"] == STUDENT:
                    iteration = metrics.iteration = line["iteration"]
                    if isinstance(samples := line.get("samples"), str):
                        if iteration != metrics.evaluated:
                            scores.clear()
                        metrics.evaluated = iteration
                        scores[samples] = row_of_samples(path, samples, line)
                        _collect(points, samples == ONE_STEP, line, (EVALUATION,))
                    else:
                        _collect(points, True, line, PER_ITERATION)
                    if is_number(limit := line.get(LIMIT)) and math.isfinite(limit):
                        metrics.limit = float(limit)
    except FileNotFoundError:
        metrics.problems.append("metrics.jsonl is missing, so there are no curves")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error
    metrics.rows = tuple(scores.values())
    metrics.curves = {name: thinned(found) for name, found in points.items()}
    if damaged == [number]:
        metrics.problems.append("the last line of metrics.jsonl is cut off and left out")
    elif damaged:
        lines = "line" if len(damaged) == 1 else "lines, the first is"
        metrics.problems.append(
            f"metrics.jsonl has {len(damaged)} damaged {lines} {damaged[0]}; left out"
        )
    return metrics


def thinned(points: Points, bins: int = BINS) -> Curve:
    """A curve of at most so many points: bins of equal numbers of iterations, and their medians."""
    iterations, values = (
        np.array(column, dtype=np.float64) for column in zip(*points, strict=True)
    )
    values[~np.isfinite(values)] = np.nan
    if len(points) <= bins:
        middle = tuple(values.tolist())
        return Curve(tuple(iterations.tolist()), middle, middle, middle, thinned=False)
    edges = np.linspace(iterations.min(), iterations.max(), bins + 1)
    places = np.clip(np.searchsorted(edges, iterations, side="right") - 1, 0, bins - 1)
    columns = []
    for place in np.unique(places):
        inside = values[places == place]
        finite = inside[~np.isnan(inside)]
        summary = (np.median(finite), finite.min(), finite.max()) if len(finite) else [np.nan] * 3
        columns.append((float(iterations[places == place].mean()), *map(float, summary)))
    at, middle, low, high = zip(*columns, strict=True)
    return Curve(at, middle, low, high, thinned=True)


def _collect(points: dict[str, Points], wanted: bool, line: dict[str, Any], names: Any) -> None:
    for name in names:
        if wanted and is_number(value := line.get(name)):
            points[name].append((line["iteration"], float(value)))


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line, or None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(line, dict) and isinstance(line.get("phase"), str)
    return line if known and type(line.get("iteration")) is int else None
