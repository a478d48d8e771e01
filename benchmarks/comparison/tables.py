"""The tables of docs/methods.md, from the results of the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from comparison.run import Run
from comparison.runner import Results
from comparison.studies import CHOICE_SEED, RATE, STUDIES, chosen_name

STEPS = (1, 2, 4)
METRICS: dict[str, str] = {
    "frechet_distance": ".2f",
    "label_agreement": ".3f",
    "diversity_ratio": ".2f",
    "recall": ".2f",
    "same_noise_rmse": ".3f",
}
CELL = "FD ↓ / label agreement ↑ / diversity ratio / recall ↑ / RMSE ↓"


def rows_of(result: dict[str, Any], network: str, steps: int) -> list[dict[str, Any]]:
    """The rows of a network at a number of steps; several with several schedules."""
    return [r for r in result["rows"] if r["network"] == network and r["steps"] == steps]


def by_what(results: Results, runs: Iterable[Run]) -> dict[str, list[dict[str, Any]]]:
    """The results of each kind of run of a study, one for each seed that is there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        result = results.find(run)
        if result is not None:
            found.setdefault(run.name.split("/")[2], []).append(result)
    return found


def seeds_of(results: Results, study: str, *, choice: bool = False) -> dict[str, list[Any]]:
    """by_what of a study, of the seed that chooses or of all others."""
    runs = [run for run in STUDIES[study]() if (run.seed == CHOICE_SEED) == choice]
    return by_what(results, runs)


def cell(rows: list[dict[str, Any]]) -> str:
    """Means over seeds of every metric; the FD with the lowest and the highest of several seeds."""
    parts = []
    for name, form in METRICS.items():
        values = [row[name] for row in rows]
        text = f"{mean(values):{form}}"
        if name == "frechet_distance" and len(values) > 1:
            text += f" ({min(values):{form}}–{max(values):{form}})"
        parts.append(text)
    return " / ".join(parts)


def methods(results: Results, study: str) -> str:
    """Every method at 1, 2 and 4 steps, and the teacher."""
    lines = [f"| method | iterations | {' | '.join(map(_steps, STEPS))} |", "|---|---|---|---|---|"]
    for what, seeds in seeds_of(results, study).items():
        lines.append(f"| {what} | {seeds[0]['iterations']} | {_cells(seeds)} |")
    return "\n".join(lines)


def _steps(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _cells(seeds: list[dict[str, Any]]) -> str:
    finished = [seed for seed in seeds if seed["rows"]]
    if not finished:
        return " | ".join(["diverged"] * len(STEPS))
    cells = []
    for steps in STEPS:
        rows = [rows_of(seed, "student", steps)[0] for seed in finished]
        cells.append(cell(rows))
    collapsed = sum(seed.get("collapsed") is not None for seed in seeds)
    lost = f" ({collapsed} of {len(seeds)} collapsed)" if collapsed else ""
    return " | ".join(cells) + lost


def learning_rates(results: Results) -> str:
    """The FD of every method by its learning rate, with the seed that chooses."""
    lines = ["| run | FD at 1 step | 2 steps | 4 steps |", "|---|---|---|---|"]
    for what, (result, *_) in seeds_of(results, "learning-rates", choice=True).items():
        distances = [
            f"{rows_of(result, 'student', steps)[0]['frechet_distance']:.2f}"
            if result["rows"]
            else "diverged"
            for steps in STEPS
        ]
        lines.append(f"| {what} | {' | '.join(distances)} |")
    return "\n".join(lines)


def teachers(results: Results, name: str) -> str:
    """A teacher by its number of Heun steps."""
    result = results.content["runs"][f"teacher/{name}"]
    lines = [f"| Heun steps | network evaluations | {CELL} |", "|---|---|---|"]
    for row in result["rows"]:
        if row["network"] == "teacher":
            lines.append(f"| {row['steps']} | {row['evaluations']} | {cell([row])} |")
    return "\n".join(lines)


def mid_times(results: Results) -> str:
    """The FD of two and four steps by the schedule, at the chosen rate and with that seed."""
    found: dict[str, dict[tuple[float, ...], float]] = {}
    for method, rate in RATE.items():
        result = results.content["runs"].get(chosen_name(method, rate))
        if result is not None and "--mid-times" in result["settings"]["evaluation"]:
            found[method] = {
                tuple(row["mid_times"]): row["frechet_distance"]
                for row in result["rows"]
                if row["network"] == "student" and row["mid_times"]
            }
    schedules = sorted({times for distances in found.values() for times in distances})
    lines = [f"| mid times | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for times in sorted(schedules, key=len):
        cells = [f"{d[times]:.2f}" if times in d else "" for d in found.values()]
        lines.append(f"| {', '.join(f'{t:g}' for t in times)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(results: Results) -> str:
    """Seconds and network evaluations of an iteration."""
    lines = [
        "| preset | method | evaluations per iteration | ms per iteration | of scm |",
        "|---|---|---|---|---|",
    ]
    for preset, costs in results.content.get("costs", {}).items():
        unit = costs["scm"]["seconds"]
        for method, cost in costs.items():
            lines.append(
                f"| {preset} | {method} | {cost['evaluations']:.1f} | {1000 * cost['seconds']:.0f} "
                f"| {cost['seconds'] / unit:.2f} |"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "teacher-digits": lambda results: teachers(results, "digits/plain/0"),
    "teacher-mnist-14": lambda results: teachers(results, "mnist-14/plain/0"),
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
            text = f"{head}{start}\n{table(results)}\n{end}{rest}"
    page.write_text(text)
