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
from rcm.distributed.processes import local_device
from rcm.errors import OptionError, RunError
from rcm.evaluation.evaluator import sample_student
from rcm.evaluation.report import save_grid
from rcm.presets import config_from_settings
from rcm.training.config import FromScratchConfig
from rcm.training.files import load_weights
from rcm.training.run_folder import read_settings
from rcm.validation import MAX_SEED, require_integer

MAX_PER_CLASS = 1000  # a wider grid is too large for a PNG of matplotlib


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw samples from the student of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    steps: int = 1
    """Sampling steps: network evaluations per sample."""
    num: int = 100
    """Number of samples: a multiple of the number of classes, up to 1000 for each class."""
    seed: int = 0
    """Seed of the noise."""
    out: Path = Path("grid.png")
    """The PNG to write, with one row per class."""

    def __post_init__(self) -> None:
        require_integer(1, steps=self.steps, num=self.num)
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
    config = _config(arguments.run)
    _require_allowed(arguments, config)
    weights = arguments.run / "student.safetensors"
    if not weights.exists():
        raise RunError(f"{weights} does not exist yet; wait for the first report of the run")
    torch.set_num_threads(config.threads)
    student = config.build_network()
    student.load_state_dict(load_weights(weights))
    student.to(config.device)
    classes = config.data.classes
    labels = torch.arange(classes).repeat_interleave(arguments.num // classes)
    # Drawn on the CPU, so that every device samples from the same noise.
    generator = Generator().manual_seed(arguments.seed)
    noise = torch.randn(arguments.num, *config.data.sample_shape, generator=generator)
    images = sample_student(
        student, noise.to(config.device), labels.to(config.device), arguments.steps, config.student
    )
    try:
        save_grid(arguments.out, {f"student, {arguments.steps} steps": images}, rows=classes)
    except OSError as error:
        raise RunError(f"writing {arguments.out} failed ({error.strerror or error})") from error


def _config(run: Path) -> FromScratchConfig:
    if not (run / "config.json").is_file():
        raise OptionError(f"{run} is not a run folder: it has no config.json")
    try:
        config = config_from_settings(read_settings(run))
    except (ValueError, TypeError) as error:
        raise RunError(f"{run / 'config.json'} cannot be used: {error}") from error
    if not isinstance(config, FromScratchConfig):
        raise OptionError(
            f"{run} distils a pretrained network, whose samples need a decoder; this command draws "
            "samples of runs that train their own teacher"
        )
    return config


def _require_allowed(arguments: Arguments, config: FromScratchConfig) -> None:
    classes = config.data.classes
    local_device(config.device)
    if arguments.num % classes or arguments.num > MAX_PER_CLASS * classes:
        raise OptionError(
            f"--num is {arguments.num}; it must be a multiple of {classes} in "
            f"{classes}..{MAX_PER_CLASS * classes}"
        )
    if arguments.steps > config.student.max_steps:
        raise OptionError(
            f"--steps is {arguments.steps}; it must be in 1..{config.student.max_steps}, because "
            "the student of this run has no times for more"
        )
    command_line.require_writable(arguments.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
