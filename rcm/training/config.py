"""The settings of a run. Presets (rcm.presets) return them; a run folder stores them."""

from __future__ import annotations

import re
from abc import ABC
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Self

import torch
import tyro
from torch import nn

from rcm.data.dataset import DataFacts, LabelledData, LabelledDataConfig
from rcm.data.latents import LatentsConfig
from rcm.distributed.layout import MeshConfig
from rcm.errors import OptionError, RunError
from rcm.models.diffusers import DiffusersConfig
from rcm.models.model import ModelConfig
from rcm.training.files import readable
from rcm.training.method import Distillation, Method
from rcm.validation import MAX_SEED, require_integer

DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")
MAX_THREADS = 1024
MIN_EVALUATION_SAMPLES = 4  # two in each half


@dataclass(frozen=True, kw_only=True)
class RunConfig(ABC):
    """What every run has; the numbers of a run follow from its config alone."""

    preset: tyro.conf.Suppress[str]
    """The preset that these settings started from: the first argument of the command."""
    method: tyro.conf.Suppress[str]
    """The method of the student: the option --method of the command."""
    seed: int = 0
    """Seed of the weights, the data order and all noise."""
    device: str = "cpu"
    """Device of networks and data: cpu, cuda or cuda:1. Under torchrun cuda is that of the rank."""
    threads: int
    """Threads of PyTorch on the CPU. Rounding depends on it slightly."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the ranks of torchrun share the work. Losses are the same up to rounding."""
    accumulation: int = 1
    """Micro-batches in which each rank computes its part of a batch, to save memory."""
    student: Distillation
    checkpoint_every: int
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints that are kept; if the newest is damaged, the one before is used."""

    def __post_init__(self) -> None:
        require_integer(0, MAX_SEED, seed=self.seed)
        require_integer(1, MAX_THREADS, threads=self.threads)
        require_integer(1, accumulation=self.accumulation, checkpoint_every=self.checkpoint_every)
        require_integer(1, keep_checkpoints=self.keep_checkpoints)
        if not isinstance(self.device, str) or not DEVICE.fullmatch(self.device):
            raise ValueError(f"device is {self.device!r}; it must be cpu, cuda or cuda:N")

    def phases(self) -> tuple[Method, ...]:
        """The methods that train a network, in their order."""
        return (self.student,)

    def shortened(self) -> Self:
        """The same run with few iterations, for a dry run."""
        return replace(self, student=self.student.shortened(), checkpoint_every=2)


@dataclass(frozen=True, kw_only=True)
class FromScratchConfig(RunConfig):
    """A run that trains its own teacher on labelled data, and scores with a classifier."""

    teacher_run: Annotated[str | None, tyro.conf.arg(name="teacher", metavar="RUN")] = None
    """Use the teacher of another run, by its folder, instead of training one."""
    data: LabelledDataConfig
    model: ModelConfig
    teacher: Method
    report_every: int
    """Iterations between sample grids and scores of the student."""
    probe_every: int = 10
    """Iterations between probes of the student, which notice a collapse."""
    evaluation_samples: int = 50_000
    """Number of real samples, evenly spaced, that scores compare as many drawn ones with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(1, report_every=self.report_every, probe_every=self.probe_every)
        require_integer(MIN_EVALUATION_SAMPLES, evaluation_samples=self.evaluation_samples)
        if self.mesh.ring * self.mesh.ulysses > 1:
            raise ValueError(
                f"mesh.ring × mesh.ulysses is {self.mesh.ring * self.mesh.ulysses}; it must be 1, "
                "because the tokens of this model are not split"
            )
        self._require_null_class()

    def _require_null_class(self) -> None:
        if not self.model.null_class:
            rule = "which needs a label that means no label: set model.null_class"
            if self.student.guidance.active:
                raise ValueError(f"student.guidance is active, {rule}")
            if self.teacher.trains_null_condition:
                raise ValueError(f"the teacher is trained without labels too, {rule}")
        guides_student = self.student.guidance.active and self.student.guides_student
        if guides_student and not self.model.guidance_input:
            raise ValueError(
                f"student.guidance is active, which is an input of the student of {self.method}: "
                "set model.guidance_input"
            )

    def phases(self) -> tuple[Method, ...]:
        return self.teacher, self.student

    def load_data(self) -> LabelledData:
        """The data set, on the CPU.

        Raises:
            OptionError: a batch is larger than the data set.
            RunError: the data cannot be read or used, or a sample contains NaN or infinity.
        """
        with readable(f"a file of {self.data.name}"):
            data = self.data.load()
        for name, batch in (("teacher", self.teacher.batch), ("student", self.student.batch)):
            if batch > len(data):
                raise OptionError(
                    f"--{name}.batch is {batch}; it must be at most {len(data)}, the number of "
                    f"samples of {self.data.name}"
                )
        if bad := data.nonfinite():
            raise RunError(
                f"{bad} of the {len(data)} samples of {self.data.name} contain NaN or infinity"
            )
        return data

    def build_network(self, facts: DataFacts) -> nn.Module:
        """The network of every role, with weights drawn from the seed, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.model.build(facts.sample_shape, facts.classes)

    def shortened(self) -> Self:
        return replace(
            super().shortened(), teacher=self.teacher.shortened(), report_every=2, probe_every=1
        )


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(RunConfig):
    """A run that distils a pretrained network of diffusers, on latents and embeddings of texts."""

    synthetic: tyro.conf.Suppress[bool] = False
    """Random weights and data where no folder is given, to try everything out."""
    compile: bool = False
    """Compile the blocks of the networks with torch.compile."""
    data: LatentsConfig
    model: DiffusersConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.mesh.ring * self.mesh.ulysses > 1:
            raise ValueError(
                f"compile is set, and mesh.ring × mesh.ulysses is "
                f"{self.mesh.ring * self.mesh.ulysses}; attention over several ranks cannot be "
                "compiled: leave out one of the two"
            )


def updated(config: Any, settings: dict[str, Any]) -> Any:
    """A config dataclass with the settings of a config.json in place of its own.

    Raises:
        ValueError: a setting is unknown or out of range.
        TypeError: a setting has a value of another type.
    """
    values = {}
    known = {field.name for field in fields(config)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"the run has a setting {name!r} that this version does not know")
        current = getattr(config, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise TypeError(f"{name} is {value!r}; it must be a group of settings")
            value = updated(current, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return replace(config, **values)
