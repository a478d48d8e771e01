"""What the training loop needs of a method. The methods themselves are in rcm.methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.errors import require_positive
from rcm.trigflow import Network

Metrics = dict[str, float]


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
        require_positive(iterations=self.iterations, batch=self.batch)

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

        noise_source draws the noise of later steps. Raises ValueError if steps is out of range.
        """
