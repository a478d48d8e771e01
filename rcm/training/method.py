"""What the training loop needs of a method. The methods themselves are in rcm.methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.trigflow import Network
from rcm.validation import require_integer, require_number

Metrics = dict[str, float]
MIN_SIGMA_MAX = 1e-3  # in units of σd; sampling starts from noise, not from data


class Method(Protocol):
    """Training in progress. `state_dict()` is complete: a restored method takes the same steps."""

    name: str
    iterations: int
    iteration: int

    def step(self) -> Metrics:
        """Do one iteration.

        Raises:
            RunError: a loss or a gradient is not finite.
        """
        ...

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Inside, the trained network with its averaged weights."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """Settings of a method; the base class of each method's own config."""

    iterations: int
    """Number of iterations."""
    batch: int
    """Samples per iteration."""

    def __post_init__(self) -> None:
        require_integer(1, iterations=self.iterations, batch=self.batch)

    @abstractmethod
    def build(self, network: nn.Module, data: Dataset, *, seed: int) -> Method:
        """Start training. All random numbers are drawn from `seed`, on the device of the data."""

    def shortened(self) -> Self:
        """The same method with two iterations, for a dry run."""
        return replace(self, iterations=2)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MethodConfig):
    """Settings of a method that distils a teacher, the network passed to `build`."""

    sigma_max: float = 80.0
    """Noise level at which sampling starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("[]", MIN_SIGMA_MAX, math.inf, sigma_max=self.sigma_max)

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """The largest number of sampling steps."""

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
