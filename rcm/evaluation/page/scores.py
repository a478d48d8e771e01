"""The scores of a run: a row for each network and number of steps, from the files of its folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

from rcm.errors import RunError

REAL, TEACHER, STUDENT = "real", "teacher", "student"
# The keys of report.json and the samples of an evaluation in metrics.jsonl.
SAMPLES = re.compile(rf"({TEACHER}|{STUDENT}), (\d+) steps?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of a network with a number of sampling steps; None is not measured."""

    network: str
    """real, teacher or student."""
    steps: int | None = None
    evaluations: int | None = None
    """Network evaluations per sample."""
    mid_times: tuple[float, ...] | None = None
    """Of a student's sampler, if it has some; an evaluation may have several for its steps."""
    frechet_distance: float | None
    label_agreement: float | None
    same_noise_rmse: float | None
    diversity: float | None = None
    diversity_ratio: float | None = None
    precision: float | None = None
    recall: float | None = None

    def metric(self, name: str) -> float | None:
        """A metric by its field's name."""
        value: float | None = getattr(self, name)
        return value


@dataclass(frozen=True)
class Metric:
    """How a metric is shown, and which value is the best."""

    name: str
    title: str
    best: Literal["lowest", "highest", "nearest to 1"]
    decimals: int

    @property
    def heading(self) -> str:
        return f"{self.title}\N{NO-BREAK SPACE}{ARROWS[self.best]}"

    def cost(self, value: float) -> float:
        """The best value has the lowest."""
        if self.best == "nearest to 1":
            return abs(value - 1)
        return value if self.best == "lowest" else -value


ARROWS = {"lowest": "↓", "highest": "↑", "nearest to 1": "→\N{NO-BREAK SPACE}1"}
METRICS = (
    Metric("frechet_distance", "FD", "lowest", 2),
    Metric("label_agreement", "Label agreement", "highest", 3),
    Metric("diversity_ratio", "Diversity ratio", "nearest to 1", 3),
    Metric("precision", "Precision", "highest", 3),
    Metric("recall", "Recall", "highest", 3),
    Metric("same_noise_rmse", "RMSE to teacher", "lowest", 3),
)


def read_json(path: Path) -> dict[str, Any] | None:
    """An object of JSON, or None if there is no such file.

    Raises:
        RunError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no object")
    return content


def rows_of_evaluation(path: Path, content: dict[str, Any]) -> tuple[Row, ...]:
    """The rows of evaluation.json. Raises RunError."""
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{path} is damaged: it has no list of rows")
    return tuple(_row(path, row) for row in rows)


def rows_of_report(path: Path, content: dict[str, Any]) -> tuple[Row, ...]:
    """The rows of report.json. Raises RunError."""
    scores = content.get("scores")
    if not isinstance(scores, dict) or not all(isinstance(s, dict) for s in scores.values()):
        raise RunError(f"{path} is damaged: it has no scores")
    return tuple(row_of_samples(path, name, s) for name, s in scores.items())


def row_of_samples(path: Path, samples: str, scores: dict[str, Any]) -> Row:
    """A row from the name of the samples, such as "student, 2 steps", and their scores.

    Raises:
        RunError: a score is not a number.
    """
    if (match := SAMPLES.fullmatch(samples)) is None:
        return _row(path, {**scores, "network": REAL})
    network, steps = match[1], int(match[2])
    # A step of Heun's method evaluates the network twice, and the last one once.
    evaluations = steps if network == STUDENT else 2 * steps - 1
    return _row(path, {**scores, "network": network, "steps": steps, "evaluations": evaluations})


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a number; NaN and infinities are."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _row(path: Path, values: dict[str, Any]) -> Row:
    network = values.get("network")
    if network not in (REAL, TEACHER, STUDENT):
        raise RunError(f"{path} is damaged: a row's network is {network!r}")
    found: dict[str, Any] = {}
    for field in fields(Row):
        value = values.get(field.name)
        if field.name == "network" or value is None:
            found[field.name] = value
        elif field.name == "mid_times":
            if not isinstance(value, list) or not all(map(is_number, value)):
                raise RunError(f"{path} is damaged: {field.name} is {value!r}")
            found[field.name] = tuple(map(float, value))
        elif not is_number(value):
            raise RunError(f"{path} is damaged: {field.name} is {value!r}")
        elif field.name in ("steps", "evaluations"):
            if not math.isfinite(value) or value < 1 or value != int(value):
                raise RunError(f"{path} is damaged: {field.name} is {value!r}")
            found[field.name] = int(value)
        else:
            found[field.name] = float(value) if math.isfinite(value) else None
    return Row(**found)
