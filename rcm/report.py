"""Compare runs on one page: scores, curves, samples and settings.

python -m rcm.report runs/digits runs/digits-scm --out report.html
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rcm import command_line
from rcm.errors import OptionError, RunError
from rcm.evaluation.page.collect import read_runs
from rcm.evaluation.page.page import page
from rcm.training.files import readable, write_atomically


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare runs on one HTML page, which needs no other file and no network."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The run folders."""
    out: Path = Path("report.html")
    """The page to write."""


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code: 2 after an invalid option, 1 after an error."""
    try:
        arguments = command_line.parse(Arguments, prog="python -m rcm.report", args=argv)
        report(arguments)
    except (OptionError, RunError) as error:
        return command_line.report(error)
    print(arguments.out)
    return 0


def report(arguments: Arguments) -> None:
    """Write the page.

    Raises:
        OptionError: a folder is no run folder or is given twice, or the page cannot be written.
        RunError: a run has nothing to show yet, or its files are damaged.
    """
    if not arguments.runs:
        raise OptionError("no run folder is given; give one or more")
    command_line.require_writable(arguments.out)
    with readable():
        content = page(read_runs(arguments.runs))
    try:
        write_atomically(arguments.out, content)
    except OSError as error:
        raise RunError(f"writing {arguments.out} failed ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
