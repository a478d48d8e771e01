"""The settings of a run. Presets (rcm.presets) return them; a run folder stores them."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
import tyro

from rcm.data.dataset import DataConfig
from rcm.errors import require_positive
from rcm.models.model import ModelConfig
from rcm.training.method import DistillationConfig, MethodConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines the numbers of a run."""

    preset: tyro.conf.Suppress[str]
    """The preset that these settings started from: the first argument of the command."""
    seed: int = 0
    """Seed of the weights, the data order and all noise."""
    device: str = "cpu"
    """Device of networks, data and noise: cpu, cuda or cuda:1."""
    threads: int
    """Threads of PyTorch on the CPU. Rounding depends on it slightly."""
    data: DataConfig
    model: ModelConfig
    teacher: MethodConfig
    student: DistillationConfig
    report_every: int
    """Iterations between sample grids and scores of the student."""
    checkpoint_every: int
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        require_positive(
            threads=self.threads,
            report_every=self.report_every,
            checkpoint_every=self.checkpoint_every,
        )
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device!r}; PyTorch knows no such device") from error

    def shortened(self) -> RunConfig:
        """The same run with two iterations in each phase, for a dry run."""
        return replace(
            self,
            teacher=self.teacher.shortened(),
            student=self.student.shortened(),
            report_every=2,
            checkpoint_every=2,
        )


def updated(config: Any, settings: dict[str, Any]) -> Any:
    """A config dataclass with the settings of a config.json in place of its own.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    values = {}
    for name, value in settings.items():
        if not hasattr(config, name):
            raise ValueError(f"the run has a setting {name!r} that this version does not know")
        current = getattr(config, name)
        if is_dataclass(current):
            value = updated(current, value)
        values[name] = tuple(value) if isinstance(current, tuple) else value
    return replace(config, **values)
