"""The networks of a run folder, which are read without its lock: the run may still be training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rcm.errors import OptionError, RunError
from rcm.presets import config_from_settings
from rcm.training.config import FromScratchConfig
from rcm.training.files import load_weights
from rcm.training.run_folder import (
    GRIDS,
    STUDENT_WEIGHTS,
    TEACHER_WEIGHTS,
    read_facts,
    read_settings,
)
from rcm.training.trainer import load_into

WAIT = {
    STUDENT_WEIGHTS: "wait for the first report of the run",
    TEACHER_WEIGHTS: "wait until the run has trained its teacher",
}


def read_config(run: Path) -> FromScratchConfig:
    """The settings of a run that trains its own teacher.

    Raises:
        OptionError: the folder is not a run folder, or that of a pretrained network.
        RunError: its settings are damaged.
    """
    if not (run / "config.json").is_file():
        raise OptionError(f"{run} is not a run folder: it has no config.json")
    try:
        config = config_from_settings(read_settings(run))
    except (ValueError, TypeError) as error:
        raise RunError(f"{run / 'config.json'} cannot be used: {error}") from error
    if not isinstance(config, FromScratchConfig):
        raise OptionError(
            f"{run} distils a pretrained network, whose samples need a decoder; this command is "
            "for runs that train their own teacher"
        )
    return config


def require_written(run: Path, name: str) -> Path:
    """The path of weights; raises RunError if the run has not written them yet."""
    path = run / name
    if not path.exists():
        raise RunError(f"{path} does not exist yet; {WAIT[name]}")
    return path


def load_network(
    run: Path, name: str, config: FromScratchConfig, device: torch.device
) -> nn.Module:
    """A network of the run, from its file `name`: STUDENT_WEIGHTS or TEACHER_WEIGHTS.

    Raises:
        RunError: the run has not written it yet, or it is damaged or of another model.
    """
    path = require_written(run, name)
    network = config.build_network(read_facts(run))
    try:
        load_into(network, load_weights(path), str(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error})") from error
    return network.to(device).eval().requires_grad_(False)


def reported_iteration(run: Path, config: FromScratchConfig) -> int:
    """The iteration of the student's weights: that of the last report, which numbers its grid."""
    grids = [int(grid.stem) for grid in (run / GRIDS).glob("*.png") if grid.stem.isdecimal()]
    return max(grids, default=config.student.iterations)
