"""The two kinds of few-step students, and how each is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from torch import Generator, Tensor

from rcm.sampling import (
    MID_TIMES,
    consistency_sample,
    consistency_times,
    flow_map_sample,
    heun_times,
)
from rcm.training.method import Distillation
from rcm.trigflow import Network
from rcm.validation import require_integer, require_numbers

MAX_JUMPS = 1000


@dataclass(frozen=True, kw_only=True)
class ConsistencyModel(Distillation):
    """A student that predicts x̂0 in one evaluation; more steps add new noise between them."""

    mid_times: tuple[float, ...] = MID_TIMES
    """Times of the sampling steps 2, 3, ...; they decrease, from below atan(sigma_max)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(None, mid_times=self.mid_times)
        first = math.atan(self.sigma_max)
        if not all(t > later for t, later in pairwise((first, *self.mid_times, 0))):
            raise ValueError(
                f"mid_times is {self.mid_times}; it must be numbers that decrease, from below "
                f"atan(sigma_max) = {first:.4g} to above 0"
            )

    @property
    def max_steps(self) -> int:
        return len(self.mid_times) + 1

    def with_mid_times(self, mid_times: tuple[float, ...]) -> Self:
        return replace(self, mid_times=mid_times)

    def sample(
        self, student: Network, noise: Tensor, condition: Any, steps: int, noise_source: Generator
    ) -> Tensor:
        times = consistency_times(steps, sigma_max=self.sigma_max, mid_times=self.mid_times)
        return consistency_sample(student, noise, times, condition, noise_source=noise_source)


@dataclass(frozen=True, kw_only=True)
class FlowMap(Distillation):
    """A student that jumps from any time to any smaller one; more steps are shorter jumps."""

    max_steps: int = 32
    """The largest number of sampling steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(1, MAX_JUMPS, max_steps=self.max_steps)

    def sample(
        self, student: Network, noise: Tensor, condition: Any, steps: int, noise_source: Generator
    ) -> Tensor:
        times = heun_times(steps, sigma_max=self.sigma_max)
        return flow_map_sample(student, noise, times, condition)
