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

from rcm.errors import RunError
from rcm.evaluation.evaluator import sample_student
from rcm.evaluation.report import save_grid
from rcm.presets import config_from_settings
from rcm.train import build_network
from rcm.training.checkpoint import load_weights
from rcm.training.run_folder import read_settings


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw samples from the student of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    steps: int = 1
    """Sampling steps: network evaluations per sample."""
    num: int = 100
    """Number of samples; a multiple of the number of classes."""
    seed: int = 0
    """Seed of the noise."""
    out: Path = Path("grid.png")
    """The PNG to write, with one row per class."""


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code, 1 after an error."""
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


def sample(arguments: Arguments) -> None:
    """Write a grid of samples.

    Raises:
        RunError: the folder is not a run folder, or has no student yet.
        ValueError: the number of steps or samples is out of range.
        OSError: the picture cannot be written.
    """
    config = config_from_settings(read_settings(arguments.run))
    classes = config.data.classes
    if arguments.num < classes or arguments.num % classes:
        raise ValueError(f"--num is {arguments.num}; it must be a positive multiple of {classes}")
    weights = arguments.run / "student.safetensors"
    if not weights.exists():
        raise RunError(f"{weights} does not exist yet; wait for the first report of the run")
    torch.set_num_threads(config.threads)
    student = build_network(config)
    student.load_state_dict(load_weights(weights))
    labels = torch.arange(classes).repeat_interleave(arguments.num // classes)
    # Drawn on the CPU, so that every device samples from the same noise.
    generator = Generator().manual_seed(arguments.seed)
    noise = torch.randn(arguments.num, *config.data.sample_shape, generator=generator)
    images = sample_student(
        student, noise.to(config.device), labels.to(config.device), arguments.steps, config.student
    )
    save_grid(arguments.out, {f"student, {arguments.steps} steps": images}, rows=classes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
