"""Runs as the page shows them: their settings, scores, curves and samples, read from their folders.

evaluation.json and evaluation.safetensors    scores and samples of `python -m rcm.evaluate`
report.json                                   the scores of a finished run that has no evaluation
metrics.jsonl                                 curves, and the scores of an unfinished run
data.json                                     what is drawn as black and as white
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rcm.errors import OptionError, RunError
from rcm.evaluation.page.metrics_file import StudentMetrics, read_metrics
from rcm.evaluation.page.scores import (
    METRICS,
    STUDENT,
    TEACHER,
    Row,
    read_json,
    rows_of_evaluation,
    rows_of_report,
)
from rcm.training.files import load_weights
from rcm.training.run_folder import (
    ANY_RANKS,
    DATA_FACTS,
    flat_settings,
    read_facts,
    read_settings,
)

# Runs that differ only in these are repetitions of each other: only rounding depends on the others.
REPETITION = ANY_RANKS | {
    *("seed", "teacher_run", "threads", "device"),
    *("checkpoint_every", "report_every", "probe_every"),
}
COLORS, DASHES = 7, 4
ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder."""

    number: int
    """Its place among all runs, which names it in the page."""
    label: str
    path: Path
    settings: dict[str, Any]
    """config.json, flat: {"student.optimizer.lr": 1e-4, ...}."""
    facts: dict[str, Any]
    """evaluation.json or report.json, or nothing."""
    rows: tuple[Row, ...]
    metrics: StudentMetrics
    samples: dict[str, Tensor]
    """evaluation.safetensors, or nothing."""
    shades: tuple[float, float] | None
    """The values of a sample that are drawn as black and as white, of data.json; None without."""
    notes: tuple[str, ...]
    """What a reader should know about its data."""
    group: int
    """Runs with the same number are repetitions with other seeds."""
    member: int
    """Its place in the group."""

    @property
    def preset(self) -> str:
        return str(self.settings.get("preset", ABSENT))

    @property
    def method(self) -> str:
        return str(self.settings.get("method", ABSENT))

    @property
    def seed(self) -> str:
        return str(self.settings.get("seed", ABSENT))

    @property
    def finished(self) -> bool:
        """Whether the scores are those of the last iteration."""
        return bool(self.facts) and self.facts.get("iterations", self._planned) == self._planned

    @property
    def iterations(self) -> str:
        """Of the student; those that were scored, if the run was unfinished."""
        if self.finished:
            return str(self._planned)
        return f"{self.facts.get('iterations', self.metrics.evaluated)} of {self._planned}"

    @property
    def _planned(self) -> Any:
        return self.settings.get("student.iterations", ABSENT)

    @property
    def color(self) -> int:
        return self.group % COLORS

    @property
    def dash(self) -> int:
        """Of its line; also the shape of its marker."""
        return (self.member + self.group) % DASHES

    @property
    def students(self) -> list[Row]:
        """By the number of steps."""
        found = [row for row in self.rows if row.network == STUDENT]
        return sorted(found, key=lambda row: row.steps or 0)

    def schedule(self, row: Row) -> str:
        """The mid times of a row of the student that is not the only one with its steps."""
        alike = [other for other in self.students if other.steps == row.steps]
        if len(alike) < 2 or not row.mid_times:
            return ""
        return ", ".join(f"{time:g}" for time in row.mid_times)

    @property
    def teachers(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.network == TEACHER)


@dataclass
class _Groups:
    """Numbers repetitions: groups in the order of the runs, and members within each."""

    members: dict[str, list[int]] = field(default_factory=dict)

    def place(self, number: int, settings: dict[str, Any]) -> tuple[int, int]:
        kept = {name: value for name, value in settings.items() if name not in REPETITION}
        key = json.dumps(kept, sort_keys=True)
        found = self.members.setdefault(key, [])
        found.append(number)
        return list(self.members).index(key), len(found) - 1


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders.

    Raises:
        OptionError: a path is no run folder, or is given twice.
        RunError: a run has nothing to show yet, or a file is damaged.
    """
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if not (path / "config.json").is_file():
            raise OptionError(f"{path} is not a run folder: it has no config.json")
        if resolved[place] in resolved[:place]:
            raise OptionError(f"{path} is given twice")
    groups = _Groups()
    labels = _labels(paths, resolved)
    return [
        _read(number, label, path, groups)
        for number, (label, path) in enumerate(zip(labels, paths, strict=True))
    ]


def _labels(paths: Sequence[Path], resolved: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    names = [path.name for path in resolved]
    if len(set(names)) == len(names):
        return names
    return [str(path) for path in (paths if len(set(map(str, paths))) == len(paths) else resolved)]


def _read(number: int, label: str, path: Path, groups: _Groups) -> Run:
    settings = flat_settings(read_settings(path))
    metrics = read_metrics(path / "metrics.jsonl")
    evaluation = read_json(path / "evaluation.json")
    report = read_json(path / "report.json")
    notes = list(metrics.problems)
    samples: dict[str, Tensor] = {}
    if evaluation is not None:
        rows = rows_of_evaluation(path / "evaluation.json", evaluation)
        if (path / "evaluation.safetensors").exists():
            samples = load_weights(path / "evaluation.safetensors")
    elif report is not None:
        rows = rows_of_report(path / "report.json", report)
        notes.append(
            "the scores are those of report.json, whose noise is not that of an evaluation; "
            "`python -m rcm.evaluate RUN`, where RUN is the run folder, adds "
            + (
                "samples"
                if _is_complete(rows)
                else "the diversity ratio, precision, recall, samples"
            )
        )
    else:
        rows = metrics.rows
        if not metrics.curves:
            raise RunError(
                f"{path} has no report yet, and no iteration of its student; wait for its first "
                "report"
            )
        done = f"it is at iteration {metrics.iteration} of its student"
        scored = f"the scores are those of iteration {metrics.evaluated}"
        notes.append(f"the run has no report yet: {done}; {scored if rows else 'no scores so far'}")
    group, member = groups.place(number, settings)
    return Run(
        number=number,
        label=label,
        path=path,
        settings=settings,
        facts=evaluation or report or {},
        rows=rows,
        metrics=metrics,
        samples=samples,
        shades=_shades(path),
        notes=tuple(notes),
        group=group,
        member=member,
    )


def _shades(path: Path) -> tuple[float, float] | None:
    if not (path / DATA_FACTS).exists():
        return None
    facts = read_facts(path)
    return facts.black, facts.white


def _is_complete(rows: tuple[Row, ...]) -> bool:
    """Whether the student has all metrics."""
    students = [row for row in rows if row.network == STUDENT]
    return all(row.metric(metric.name) is not None for row in students for metric in METRICS)
