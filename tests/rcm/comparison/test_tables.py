"""Tables and figures of the comparison with results that are missing, diverged or collapsed."""

from pathlib import Path
from typing import Any

import pytest
from comparison import figures, studies, tables
from comparison.run import Run
from comparison.runner import Results
from matplotlib.axes import Axes

from tests.rcm.comparison.test_results import row

ITERATIONS = ("--student.iterations", "7")
TEACHER = studies.teacher("digits")
RUNS = [
    Run(
        name=f"methods/digits/{method}/{seed}",
        preset="digits",
        method=method,
        seed=seed,
        options=ITERATIONS,
        teacher=TEACHER,
    )
    for method in ("scm", "dmd")
    for seed in range(3)
]
FINISHED = {
    "iterations": 7,
    "collapsed": None,
    "rows": [row("real", None, 1.0), *(row("student", n, 2.0) for n in (1, 2, 4))],
}
DIVERGED: dict[str, Any] = {"iterations": 7, "diverged": "iteration 5: nan", "rows": []}
TAUGHT = {"rows": [row("real", None, 1.0), row("teacher", 32, 1.5)]}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """No results of a study of two methods with three seeds."""
    monkeypatch.setitem(studies.STUDIES, "digits", lambda: iter(RUNS))
    return Results(tmp_path / "methods.json")


def test_a_table_says_how_many_seeds_diverged_collapsed_or_are_missing(results: Results) -> None:
    results.add(RUNS[0], DIVERGED)
    results.add(RUNS[1], FINISHED)
    results.add(RUNS[2], DIVERGED)
    results.add(RUNS[3], FINISHED | {"collapsed": 5})
    table = tables.methods(results, "digits")
    assert "| 1 | scm (2 of 3 diverged) | 7 | 2.00 | " in table
    assert "| 4 | dmd (1 of 3 seeds, 1 of 1 collapsed) | 7 | 2.00 | " in table
    for run in RUNS[:3]:
        results.add(run, FINISHED)
    assert "| 2 | scm | 7 | 2.00 (2.00–2.00) | " in tables.methods(results, "digits")
    for run in RUNS[:3]:
        results.add(run, DIVERGED)
    assert "| 2 | scm (3 of 3 diverged) | 7 | diverged |" in tables.methods(results, "digits")


def test_the_figure_leaves_out_seeds_that_diverged(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(Axes, "errorbar", lambda _, x, y, label, **__: drawn.append((label, y)))
    results.add(TEACHER, TAUGHT)
    results.add(RUNS[0], DIVERGED)
    results.add(RUNS[1], FINISHED)
    results.add(RUNS[3], DIVERGED)
    figures.draw_quality(tmp_path / "figure.png", results, "digits", "digits")
    assert (tmp_path / "figure.png").exists()
    assert drawn[0] == ("scm (2 of 3 seeds, 1 of 2 diverged)", [2.0, 2.0, 2.0])
    assert {label.split()[0] for label, _ in drawn} == {"scm"}


def test_figures_without_a_teacher_or_samples_are_left_out(
    results: Results, tmp_path: Path
) -> None:
    path = tmp_path / "figure.png"
    results.add(RUNS[0], FINISHED)
    figures.draw_quality(path, results, "digits", "digits")
    figures.draw_grid(path, {}, "methods", "digits")
    assert not path.exists()


@pytest.mark.parametrize("name", ["teacher-digits", "teacher-mnist-14", "digits", "costs"])
def test_a_table_without_results_is_left_out(results: Results, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- table {name} -->\n| old |\n<!-- end -->\nafter\n")
    tables.fill(page, results)
    assert page.read_text() == f"before\n<!-- table {name} -->\n<!-- end -->\nafter\n"
