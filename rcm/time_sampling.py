"""Distributions of the training time t, drawn in float64.

The consistency loss draws from p_G and the DMD loss from p_D (rCM, 2510.08431). A published
LogNormal(m, s) means log(σ) ~ N(m, s²).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rcm.time_conversions import t_from_sigma, t_from_u
from rcm.validation import require_number, require_positive

MAX_LOG_SIGMA = 50.0  # t of a larger σ is π/2 in float64, t of its inverse is below 1e-21


class TimeDistribution(ABC):
    """A distribution of the training time; the base class of each."""

    @abstractmethod
    def __call__(self, count: int, generator: Generator) -> Tensor:
        """t (count,) float64 in [0, π/2], on the generator's device."""


@dataclass(frozen=True, kw_only=True)
class LogNormal(TimeDistribution):
    """log(σ) ~ N(mean, std²), σ = σd tan(t) (EDM, 2206.00364 §5; P_mean and P_std)."""

    mean: float
    """Mean of log σ."""
    std: float
    """Standard deviation of log σ."""
    sigma_data: float = 1.0
    """Standard deviation σd of the data."""

    def __post_init__(self) -> None:
        require_number("[]", -MAX_LOG_SIGMA, MAX_LOG_SIGMA, mean=self.mean)
        require_number("(]", 0, MAX_LOG_SIGMA, std=self.std)
        require_positive(sigma_data=self.sigma_data)

    def __call__(self, count: int, generator: Generator) -> Tensor:
        normal = torch.randn(
            count, generator=generator, device=generator.device, dtype=torch.float64
        )
        return t_from_sigma(torch.exp(self.mean + self.std * normal), self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class ShiftedUniform(TimeDistribution):
    """Rectified flow's u, uniform in [0, 1), then shifted towards noise by shift_u.

    This is the time shift of Stable Diffusion 3 (2403.03206); shift = 1 leaves u uniform.
    """

    shift: float
    """How far u moves towards noise; 1 leaves it uniform."""

    def __post_init__(self) -> None:
        require_positive(shift=self.shift)

    def __call__(self, count: int, generator: Generator) -> Tensor:
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        return t_from_u(shift_u(u, self.shift))


def shift_u(u: Tensor, shift: float) -> Tensor:
    """Rectified flow's u in [0, 1], shifted towards noise: s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def rollout_times(
    steps: int, count: int, distribution: TimeDistribution, generator: Generator
) -> Tensor:
    """Times of a student rollout: (steps, count) float64, t₁ = π/2, tₙ₊₁ = min(t̂ ~ p_D, tₙ).

    Random times train the student for any sampling schedule; rCM draws steps from 1..4. Raises
    ValueError if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"a rollout has at least one step, got {steps}")
    drawn = [torch.full((count,), torch.pi / 2, dtype=torch.float64, device=generator.device)]
    drawn += [distribution(count, generator) for _ in range(steps - 1)]
    return torch.cummin(torch.stack(drawn), dim=0).values
