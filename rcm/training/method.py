"""A method: its settings, the networks that it needs, its losses and its sampler.

A method is a frozen dataclass of settings with three functions:

    roles()        the networks: which are trained, which are moving averages, where they start
    losses(step)   yields the losses of one iteration, those of one network at a time. The trainer
                   takes an optimizer step on that network before it asks for the next
    sample(...)    draws samples from the trained network

The trainer (trainer.py) knows no method, and a method knows no data set. Methods are in
rcm.methods; scm.py there is a short one to start from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map

from rcm.guidance import Guidance, guided
from rcm.losses.loss import Loss
from rcm.time_pairs import TimePairDistribution
from rcm.time_sampling import TimeDistribution
from rcm.training.batches import Batch
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig
from rcm.trigflow import Network
from rcm.validation import require_integer, require_number

MIN_SIGMA_MAX = 1e-3  # in units of σd; sampling starts from noise, not from data
TEACHER, SCRATCH = "teacher", "scratch"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network with an optimizer, and a moving average of its weights if it has an ema."""

    optimizer: OptimizerConfig
    ema: EMAConfig | None = None
    start: str = TEACHER
    """Where its weights come from: "teacher", "scratch", or the student of a run, by its folder."""


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """A network whose weights are the moving average of a trained one."""

    of: str
    ema: EMAConfig


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A network that is not trained."""

    start: str = TEACHER


Role = Trained | Averaged | Frozen
Losses = Iterator[tuple[str, dict[str, Loss]]]


class Step:
    """One iteration, as a method sees it: a batch, the networks, and all of its randomness."""

    def __init__(
        self,
        iteration: int,
        batch: Batch,
        networks: Mapping[str, nn.Module],
        updates: Mapping[str, int],
    ) -> None:
        self.iteration = iteration
        """0, 1, ... in this run."""
        self.updates = updates
        """Optimizer steps of each trained network so far, by role."""
        self.x0, self.condition = batch.x0, batch.condition
        self._batch, self._networks = batch, networks

    def network(self, role: str) -> Network:
        """The network of a role. Raises KeyError for a role that the method does not have."""
        return self._networks[role]

    @property
    def student(self) -> Network:
        return self.network("student")

    @property
    def teacher(self) -> Network:
        return self.network("teacher")

    @property
    def critic(self) -> Network:
        return self.network("critic")

    @property
    def target(self) -> Network:
        return self.network("target")

    def noise(self) -> Tensor:
        """Standard normal noise, like x0."""
        return self._batch.noise()

    def draw(self, distribution: Callable[[int, Generator], Any]) -> Any:
        """Random numbers of each sample, from distribution(count, generator).

        distribution returns tensors (..., count), one or a tuple of them; so does this function,
        with the samples of this step as count.
        """
        return self._batch.draw(distribution)

    def times(self, distribution: TimeDistribution) -> Tensor:
        """A time for each sample: (batch,) float64."""
        times: Tensor = self.draw(distribution)
        return times

    def time_pairs(self, distribution: TimePairDistribution) -> tuple[Tensor, Tensor]:
        """The two times of a flow map for each sample, t and end <= t: (batch,) float64 each."""
        t, end = self.draw(distribution)
        return t, end

    def integer(self, low: int, high: int) -> int:
        """A random integer in [low, high], the same for all samples of the iteration."""
        return int(torch.randint(low, high + 1, (), generator=self._batch.shared))

    def condition_with_dropout(self, rate: float) -> Any:
        """The condition, of which a fraction of the samples is replaced by the empty one."""
        if rate == 0:
            return self.condition
        drawn = self.draw(lambda count, generator: torch.rand(count, generator=generator))

        def dropped(condition: Tensor, null: Tensor) -> Tensor:
            chosen = (drawn < rate).view(-1, *[1] * (condition.ndim - 1))
            return torch.where(chosen, null, condition)

        return tree_map(dropped, self.condition, self.null_condition(self.condition))

    def null_condition(self, condition: Any) -> Any:
        """The empty condition for classifier-free guidance, shaped like the condition."""
        return self._batch.null_condition(condition)

    def guided_teacher(self, guidance: Guidance) -> Network:
        """The teacher with guidance, whose scale is drawn for each sample if it is random."""
        if not guidance.active:
            return self.teacher
        scale = self.draw(guidance.draw)
        return guided(self.teacher, self.null_condition, scale, guidance.interval)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of a method that trains a network; the base class of each method."""

    result: ClassVar[str]
    """The role whose averaged weights are the result."""

    iterations: int
    """Number of iterations."""
    batch: int
    """Samples per iteration."""
    optimizer: OptimizerConfig
    ema: EMAConfig
    """The moving average of the trained weights, which is the result."""

    def __post_init__(self) -> None:
        require_integer(1, iterations=self.iterations, batch=self.batch)

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """The networks of this method."""

    @abstractmethod
    def losses(self, step: Step) -> Losses:
        """Yield (role, {name: loss}) once for each network that this iteration trains.

        The trainer minimises the sum of the batch means of the losses.
        """

    @property
    def trains_null_condition(self) -> bool:
        """Whether the result knows the empty condition, so that it can be guided."""
        return False

    def shortened(self) -> Self:
        """The same method with few iterations that exercise every loss, for a dry run."""
        return replace(self, iterations=2)


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """Settings of a method that trains a few-step student."""

    result: ClassVar[str] = "student"
    guides_student: ClassVar[bool] = False
    """Whether the guidance is an input of the student instead of the teacher's."""

    start: str = TEACHER
    """The student's first weights: teacher, scratch, or the folder of a run for its student."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance of the teacher, or of a student that takes it as an input."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("[]", MIN_SIGMA_MAX, math.inf, sigma_max=self.sigma_max)

    def student_role(self) -> Trained:
        """The student: trained from `start`, with its moving average."""
        return Trained(optimizer=self.optimizer, ema=self.ema, start=self.start)

    def require_no_guidance(self, reason: str) -> None:
        """Raise ValueError if the guidance is active, where it would have no effect."""
        if self.guidance.active:
            raise ValueError(
                f"guidance is active; it must have scale 1 and no max_scale, because {reason}"
            )

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """The largest number of sampling steps."""

    def with_mid_times(self, mid_times: tuple[float, ...]) -> Self:
        """The method with other times of the sampling steps 2, 3, ..., to sample its student.

        Raises ValueError if they are not allowed, or if its sampler has no such times.
        """
        raise ValueError("the sampler of this method has no mid times")

    @abstractmethod
    def sample(
        self,
        student: Network,
        noise: Tensor,
        condition: Any,
        steps: int,
        noise_source: Generator,
    ) -> Tensor:
        """Sample in `steps` network evaluations, from pure noise (batch, ...) to data.

        noise_source draws the noise of later steps. Raises ValueError unless steps is in
        1..max_steps.
        """
