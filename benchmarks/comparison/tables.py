"""The tables of docs/methods.md, from the results of the runs. One without results is empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from comparison.choices import CHOICE_SEED, RATE, RATES
from comparison.run import Run
from comparison.runner import Results
from comparison.studies import STUDIES, chosen_name, teacher

from rcm.evaluation.evaluator import student_source
from rcm.presets.from_scratch import FROM_SCRATCH

STEPS = (1, 2, 4)
METRICS: dict[str, tuple[str, str]] = {  # the head and the format of a column
    "frechet_distance": ("FD ↓", ".2f"),
    "label_agreement": ("label agreement ↑", ".3f"),
    "diversity_ratio": ("diversity ratio", ".2f"),
    "recall": ("recall ↑", ".2f"),
    "same_noise_rmse": ("RMSE ↓", ".3f"),
}
METRIC_HEADS = [head for head, _ in METRICS.values()]


def rows_of(result: dict[str, Any], network: str, steps: int) -> list[dict[str, Any]]:
    """The rows of a network at a number of steps; several with several schedules."""
    return [r for r in result["rows"] if r["network"] == network and r["steps"] == steps]


def by_what(results: Results, runs: Iterable[Run]) -> dict[str, list[dict[str, Any]]]:
    """The results of each kind of run of a study, one for each seed that is there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        result = results.find(run)
        if result is not None:
            found.setdefault(run.what, []).append(result)
    return found


def runs_of(study: str, *, choice: bool = False) -> list[Run]:
    """The runs of a study, of the seed that chooses or of all others."""
    return [run for run in STUDIES[study]() if (run.seed == CHOICE_SEED) == choice]


def titles(runs: Iterable[Run], found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The title of each kind of run that by_what has found, with what is amiss with its seeds."""
    planned = Counter(run.what for run in runs)
    return {what: what + _amiss(seeds, planned[what]) for what, seeds in found.items()}


def _amiss(seeds: list[dict[str, Any]], planned: int) -> str:
    diverged = sum(not seed["rows"] for seed in seeds)
    collapsed = sum(seed.get("collapsed") is not None for seed in seeds)
    parts = [f"{len(seeds)} of {planned} seeds"] if len(seeds) < planned else []
    parts += [f"{diverged} of {len(seeds)} diverged"] if diverged else []
    parts += [f"{collapsed} of {len(seeds)} collapsed"] if collapsed else []
    return f" ({', '.join(parts)})" if parts else ""


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds of every metric; the FD with the lowest and the highest of several seeds."""
    parts = []
    for name, (_, form) in METRICS.items():
        values = [row[name] for row in rows]
        text = f"{mean(values):{form}}"
        if name == "frechet_distance" and len(values) > 1:
            text += f" ({min(values):{form}}–{max(values):{form}})"
        parts.append(text)
    return parts


def methods(results: Results, study: str) -> str:
    """Every kind of run at 1, 2 and 4 steps: means over the seeds that have not diverged.

    Changes of sCM are beside sCM without a change.
    """
    runs = runs_of(study)
    if study == "ablations":
        runs = [run for run in runs_of("digits") if run.what == "scm"] + runs
    found = by_what(results, runs)
    titled = titles(runs, found)
    lines = []
    for steps in STEPS:
        for what, seeds in found.items():
            rows = [rows_of(seed, "student", steps)[0] for seed in seeds if seed["rows"]]
            scores = cells(rows) if rows else ["diverged"] + [""] * (len(METRICS) - 1)
            lines.append([str(steps), titled[what], str(seeds[0]["iterations"]), *scores])
    return _table(["steps", "run", "iterations", *METRIC_HEADS], lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown; without lines it is empty."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""


def learning_rates(results: Results) -> str:
    """The FD at 1, 2 and 4 steps by method and learning rate, with the seed that chooses."""
    runs = {run.name: run for run in runs_of("learning-rates", choice=True)}
    lines = []
    for method, chosen in RATE.items():
        scores = {r: _distances(results, runs.get(chosen_name(method, r))) for r in RATES}
        if any(scores.values()):
            scores[chosen] = f"**{scores[chosen]}**"
            lines.append([method, *scores.values()])
    return _table(["method", *(f"{rate:g}" for rate in RATES)], lines)


def _distances(results: Results, run: Run | None) -> str:
    """The FD at each number of steps, and whether the run collapsed or diverged."""
    result = None if run is None else results.find(run)
    if run is None or result is None:
        return ""
    if not result["rows"]:
        return "diverged"
    student = FROM_SCRATCH[run.preset].methods[run.method]
    scores = []
    for steps in STEPS:
        wanted = student_source(student, steps).mid_times  # of the preset today
        rows = rows_of(result, "student", steps)
        row = next(r for r in rows if wanted is None or r["mid_times"] == list(wanted))
        scores.append(f"{row['frechet_distance']:.2f}")
    return " / ".join(scores) + ("" if result.get("collapsed") is None else ", collapsed")


def teachers(results: Results, preset: str) -> str:
    """The teacher of a preset by its number of Heun steps."""
    result = results.find(teacher(preset))
    rows = [] if result is None else [r for r in result["rows"] if r["network"] == "teacher"]
    return _table(
        ["Heun steps", "network evaluations", *METRIC_HEADS],
        [[str(row["steps"]), str(row["evaluations"]), *cells([row])] for row in rows],
    )


def mid_times(results: Results) -> str:
    """The FD of two and four steps by the schedule, at the chosen rate and with that seed."""
    chosen = {chosen_name(method, rate) for method, rate in RATE.items()}
    found: dict[str, dict[tuple[float, ...], float]] = {}
    for run in runs_of("learning-rates", choice=True):
        result = results.find(run) if run.name in chosen and run.evaluation else None
        if result is not None:
            found[run.method] = {
                tuple(row["mid_times"]): row["frechet_distance"]
                for row in result["rows"]
                if row["network"] == "student" and row["mid_times"]
            }
    schedules = {times for distances in found.values() for times in distances}
    lines = []
    for times in sorted(schedules, key=lambda times: (len(times), times)):
        scores = [f"{d[times]:.2f}" if times in d else "" for d in found.values()]
        lines.append([", ".join(f"{t:g}" for t in times), *scores])
    return _table(["mid times", *found], lines)


def costs(results: Results) -> str:
    """Network evaluations of an iteration, and its time in the last phase."""
    head = ["preset", "method", "evaluations per iteration, mean over a run"]
    head += ["ms per iteration, last phase", "time relative to scm"]
    lines = []
    for preset, costs in results.content.get("costs", {}).items():
        unit = costs["scm"]["seconds"]
        for method, cost in costs.items():
            times = [f"{1000 * cost['seconds']:.0f}", f"{cost['seconds'] / unit:.2f}"]
            lines.append([preset, method, f"{cost['evaluations']:.1f}", *times])
    return _table(head, lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "teacher-digits": lambda results: teachers(results, "digits"),
    "teacher-mnist-14": lambda results: teachers(results, "mnist-14"),
    "learning-rates": learning_rates,
    "mid-times": mid_times,
    "costs": costs,
    **{
        study: lambda results, study=study: methods(results, study)  # type: ignore[misc]
        for study in STUDIES
        if study != "learning-rates"
    },
}


def fill(page: Path, results: Results) -> None:
    """Replace the tables of a page, between `<!-- table NAME -->` and `<!-- end -->`."""
    text = page.read_text()
    for name, table in TABLES.items():
        start, end = f"<!-- table {name} -->", "<!-- end -->"
        head, found, tail = text.partition(start)
        if found:
            _, _, rest = tail.partition(end)
            content = table(results)
            lines = f"{content}\n" if content else ""
            text = f"{head}{start}\n{lines}{end}{rest}"
    page.write_text(text)
