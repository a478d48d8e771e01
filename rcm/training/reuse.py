"""Weights of other runs: a teacher that several runs share, a student that another run continues.

They are copied into the run folder at the start, so that the run can be continued without the
other folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rcm.data.dataset import OF_NETWORKS, DataFacts, require_same_facts
from rcm.errors import OptionError, RunError
from rcm.training.config import FromScratchConfig, RunConfig
from rcm.training.files import load_weights
from rcm.training.method import SCRATCH, TEACHER
from rcm.training.run_folder import (
    START_WEIGHTS,
    STUDENT_WEIGHTS,
    TEACHER_WEIGHTS,
    read_facts,
    read_settings,
)
from rcm.training.trainer import load_into

ReadConfig = Callable[[dict[str, Any]], RunConfig]
"""Reads the settings of a config.json."""


def with_teacher_settings(
    config: FromScratchConfig,
    run: Path,
    *,
    default: FromScratchConfig,
    read_config: ReadConfig,
) -> FromScratchConfig:
    """The config with the teacher's settings of `config.teacher_run`, which it must not contradict.

    run is the folder of this run, which has its own copy once it started; read_config reads the
    settings of a config.json.

    Raises:
        OptionError: a setting of the teacher was given together with another run's teacher, or a
            teacher that was not trained without labels shall be guided.
        RunError: the other run is missing or unfinished, or has other data.
    """
    if config.teacher_run is None:
        return _guidable(config)
    other = Path(config.teacher_run)
    source = run if (run / TEACHER_WEIGHTS).exists() else other
    found = _config_of(source, read_config)
    _require_same_data(config, found, other)
    if config.teacher not in (default.teacher, found.teacher):
        raise OptionError(
            f"--teacher is {other}, which brings the settings of its teacher; leave out the "
            "options --teacher.*"
        )
    return _guidable(replace(config, teacher=found.teacher))


def weights_of_other_runs(
    config: FromScratchConfig,
    run: Path,
    facts: DataFacts,
    *,
    build: Callable[[], nn.Module],
    read_config: ReadConfig,
) -> dict[str, bytes]:
    """The files that the config takes from other runs and that the folder `run` does not have yet.

    facts: of the data of this run; build makes a network of the config, to check that the weights
    fit.

    Raises:
        RunError: the other run is missing or unfinished, or has other data or another model.
    """
    wanted: dict[str, Path] = {}
    if config.teacher_run is not None:
        wanted[TEACHER_WEIGHTS] = Path(config.teacher_run) / TEACHER_WEIGHTS
    if config.student.start not in (TEACHER, SCRATCH):
        wanted[START_WEIGHTS] = Path(config.student.start) / STUDENT_WEIGHTS
    found = {}
    for name, source in wanted.items():
        if (run / name).exists():
            continue
        other = _config_of(source.parent, read_config)
        _require_same_data(config, other, source.parent)
        if differences := config.model.differences(other.model):
            raise RunError(f"{source} are of another model: {'; '.join(differences)}")
        require_same_facts(
            read_facts(source.parent),
            facts,
            origin=f"{source.parent} was trained on",
            remedy="restore them, or use a run on these data",
            names=OF_NETWORKS,
        )
        if not source.exists():
            raise RunError(f"{source} does not exist yet; wait until its run has written it")
        load_into(build(), load_weights(source), str(source))
        found[name] = source.read_bytes()
    return found


def _guidable(config: FromScratchConfig) -> FromScratchConfig:
    """The config, checked: guidance of a teacher needs its prediction for the empty condition."""
    guided = config.student.guidance.active and "teacher" in config.student.roles()
    if guided and not config.teacher.trains_null_condition:
        raise OptionError(
            "--student.guidance is active, but the teacher is not trained without labels; train "
            "one with --model.null-class --teacher.label-dropout 0.1"
        )
    return config


def _config_of(run: Path, read_config: ReadConfig) -> FromScratchConfig:
    settings = read_settings(run)
    try:
        config = read_config(settings)
    except (ValueError, TypeError) as error:
        raise RunError(f"{run / 'config.json'} cannot be used ({error})") from error
    if not isinstance(config, FromScratchConfig):
        raise RunError(f"{run} distils a pretrained network; it has no teacher of its own")
    return config


def _require_same_data(config: FromScratchConfig, other: FromScratchConfig, run: Path) -> None:
    if other.data != config.data:
        raise RunError(f"{run} was trained on {other.data}, but this run uses {config.data}")
