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

from rcm import command_line
from rcm.data.dataset import DataFacts
from rcm.distributed.processes import local_device
from rcm.errors import OptionError, RunError
from rcm.evaluation.evaluator import sample_student
from rcm.evaluation.report import save_grid
from rcm.trained_networks import load_network, read_config, require_written
from rcm.training.config import FromScratchConfig
from rcm.training.run_folder import STUDENT_WEIGHTS, read_facts
from rcm.validation import MAX_SEED, require_integer

DEFAULT_PER_CLASS = 10
MAX_CLASSES, MAX_PER_CLASS = 100, 1000  # a larger grid is too large for a PNG of matplotlib


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw samples from the student of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    steps: int = 1
    """Sampling steps: network evaluations per sample."""
    num: int | None = None
    """Number of samples: a multiple of the number of classes, up to 1000 for each class. By default
    10 for each."""
    classes: tuple[int, ...] = ()
    """Labels of the classes to draw, up to 100. By default all; the run's data.json names them."""
    seed: int = 0
    """Seed of the noise."""
    out: Path = Path("grid.png")
    """The PNG to write, with one row per class."""

    def __post_init__(self) -> None:
        require_integer(1, steps=self.steps)
        if self.num is not None:
            require_integer(1, num=self.num)
        require_integer(0, MAX_SEED, seed=self.seed)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code: 2 after an invalid option, 1 after an error."""
    try:
        arguments = command_line.parse(Arguments, prog="python -m rcm.sample", args=argv)
        sample(arguments)
    except (OptionError, RunError) as error:
        return command_line.report(error)
    print(arguments.out)
    return 0


def sample(arguments: Arguments) -> None:
    """Write a grid of samples.

    Raises:
        OptionError: the folder is not a run folder, the picture cannot be written, or a number is
            out of range.
        RunError: the run has no student yet, or its files are damaged.
    """
    config = read_config(arguments.run)
    require_written(arguments.run, STUDENT_WEIGHTS)
    facts = read_facts(arguments.run)
    classes = arguments.classes or tuple(range(facts.classes))
    num = DEFAULT_PER_CLASS * len(classes) if arguments.num is None else arguments.num
    _require_allowed(arguments, config, facts, classes, num)
    torch.set_num_threads(config.threads)
    device = local_device(config.device)
    student = load_network(arguments.run, STUDENT_WEIGHTS, config, device)
    labels = torch.tensor(classes).repeat_interleave(num // len(classes))
    # Drawn on the CPU, so that every device samples from the same noise.
    generator = Generator().manual_seed(arguments.seed)
    noise = torch.randn(num, *facts.sample_shape, generator=generator)
    images = sample_student(
        student, noise.to(device), labels.to(device), arguments.steps, config.student
    )
    try:
        title = f"student, {arguments.steps} steps"
        save_grid(
            arguments.out, {title: images}, len(classes), black=facts.black, white=facts.white
        )
    except OSError as error:
        raise RunError(f"writing {arguments.out} failed ({error.strerror or error})") from error


def _require_allowed(
    arguments: Arguments,
    config: FromScratchConfig,
    facts: DataFacts,
    classes: tuple[int, ...],
    num: int,
) -> None:
    count = len(classes)
    if not all(0 <= label < facts.classes for label in classes):
        raise OptionError(
            f"--classes is {classes}; they must be integers in 0..{facts.classes - 1}, the labels "
            "of the run"
        )
    if count > MAX_CLASSES:
        raise OptionError(
            f"the run has {facts.classes} classes, and a picture shows up to {MAX_CLASSES}: choose "
            "some with --classes"
        )
    if num % count or num > MAX_PER_CLASS * count:
        raise OptionError(
            f"--num is {num}; it must be a multiple of {count} in {count}..{MAX_PER_CLASS * count}"
        )
    if arguments.steps > config.student.max_steps:
        raise OptionError(
            f"--steps is {arguments.steps}; it must be in 1..{config.student.max_steps}, because "
            "the student of this run has no times for more"
        )
    command_line.require_writable(arguments.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
