"""Draw samples from the student of a run.

python -m rcm.sample runs/digits --steps 2 --num 100 --out grid.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Generator

from rcm.checkpoint import load_weights
from rcm.config import config_from_settings
from rcm.digits import CLASSES, SIZE
from rcm.errors import RunError
from rcm.evaluation import sample_student
from rcm.report import save_grid
from rcm.run_folder import read_settings
from rcm.training import build_network


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command says."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    steps: int = 1
    """Sampling steps: network evaluations per sample."""
    num: int = 100
    """Number of samples, spread evenly over the ten digits."""
    seed: int = 0
    """Of the noise."""
    out: Path = Path("grid.png")
    """The PNG to write: one row for each digit."""


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code, 1 for anything that a user can mend."""
    try:
        arguments = tyro.cli(Arguments, prog="python -m rcm.sample", args=argv)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        sample(arguments)
    except (RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.out)
    return 0


@torch.no_grad()
def sample(arguments: Arguments) -> None:
    """Write a grid of samples.

    Raises:
        RunError: the folder is no run, or its student is not there yet.
        ValueError: the number of steps or samples is out of range.
        OSError: the picture cannot be written.
    """
    if arguments.num < CLASSES or arguments.num % CLASSES:
        raise ValueError(f"--num is {arguments.num}; it must be a positive multiple of {CLASSES}")
    config = config_from_settings(read_settings(arguments.run))
    weights = arguments.run / "student.safetensors"
    if not weights.exists():
        raise RunError(f"{weights} does not exist yet: let the run distil for a while")
    student = build_network(config)
    student.load_state_dict(load_weights(weights))
    labels = torch.arange(CLASSES).repeat_interleave(arguments.num // CLASSES)
    generator = Generator().manual_seed(arguments.seed)
    noise = torch.randn(arguments.num, 1, SIZE, SIZE, generator=generator)
    images = sample_student(student, noise, labels, arguments.steps, config.student)
    save_grid(arguments.out, {f"student, {arguments.steps} steps": images}, rows=CLASSES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
