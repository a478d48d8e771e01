"""Every method against every other: the tables and figures of docs/methods.md.

    python benchmarks/methods.py                         everything that is missing, in some hours
    python benchmarks/methods.py digits discrete         only these studies
    python benchmarks/methods.py --list                  what there is to do
    python benchmarks/methods.py --draw                  only tables and figures, from the results

Runs `python -m rcm.train` and `python -m rcm.evaluate`, --jobs of them at a time with one thread
each. A finished run is not repeated and an interrupted one is continued: repeat the command.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from pathlib import Path
from typing import BinaryIO

from comparison.figures import draw_grid, draw_quality
from comparison.run import Run
from comparison.runner import Results, Runner
from comparison.samples import samples
from comparison.speed import costs
from comparison.studies import METHODS, STUDIES
from comparison.tables import fill
from environment import environment

from rcm.errors import OptionError, RunError

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "methods.md"
COMPARED = {"digits": "digits", "mnist-14": "mnist-14"}  # the study of each preset with all methods


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"some of {', '.join(STUDIES)}, speed")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--list", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--draw", action="store_true", help="only the tables and the figures")
    options = parser.parse_args()
    chosen = options.studies or [*STUDIES, "speed"]
    if unknown := set(chosen) - {*STUDIES, "speed"}:
        parser.error(f"unknown study {', '.join(unknown)}; there are {', '.join(STUDIES)}, speed")
    if options.list or options.draw:
        return work(options, chosen)
    try:
        with locked(options.runs):
            return work(options, chosen)
    except (RuntimeError, RunError, OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to continue", file=sys.stderr)
        return 130


def locked(folder: Path) -> BinaryIO:
    """Create the folder; return its lock. Raises RunError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "wb")  # noqa: SIM115 (held while the command runs)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunError(f"another process makes the runs in {folder}") from error
    return lock


def work(options: argparse.Namespace, chosen: list[str]) -> int:
    """Make what is missing, and show it. Returns the exit code."""
    out = HERE / "results"
    results = Results(out / "methods.json")
    kept = out / "methods-samples.safetensors"
    runs: list[Run] = []
    for study in chosen if not options.draw else ():
        if study != "speed":
            runs += _with_teachers(list(STUDIES[study]()))
    missing = list({run.name: run for run in runs if results.find(run) is None}.values())
    if options.list:
        print("\n".join(run.name for run in missing))
        return 0
    Runner(options.runs, results, kept, options.jobs).make(missing)
    if "speed" in chosen and not options.draw:
        measured = {preset: costs(preset, METHODS[preset]) for preset in COMPARED}
        results.content |= {"costs": measured, "costs_environment": environment()}
        results.write()
    draw(results, out, kept)
    return 0


def _with_teachers(runs: list[Run]) -> list[Run]:
    """The runs and their teachers, which are scored too."""
    teachers = {run.teacher.name: run.teacher for run in runs if run.teacher is not None}
    return [*teachers.values(), *runs]


def draw(results: Results, out: Path, kept: Path) -> None:
    """Write the tables into docs/methods.md, and the figures, of the results that are there."""
    for preset, study in COMPARED.items():
        suffix = "" if preset == "digits" else f"-{preset}"
        draw_quality(out / f"methods{suffix}.png", results, study, preset)
        draw_grid(out / f"methods-grid{suffix}.png", samples(kept), "methods", preset)
    if PAGE.exists():
        fill(PAGE, results)


if __name__ == "__main__":
    sys.exit(main())
