"""Distributions of the two times of a flow map: it moves a sample from t to end <= t.

They are drawn in float64. In TrigFlow's σ = tan(t) and rectified flow's u, σ = u / (1 - u), so

    ln σ = logit(u):    logit-normal u  is  log-normal σ.

With σd = 1, which is what TrigFlow networks see, time_sampling.LogNormal(mean=m, std=s) is
therefore the logit-normal distribution LN(m, s) of the MeanFlow papers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rcm.time_conversions import t_from_u, u_from_t
from rcm.time_sampling import MAX_LOG_SIGMA, LogNormal
from rcm.validation import require_number


class TimePairDistribution(ABC):
    """A distribution of the two times of a flow map; the base class of each."""

    @abstractmethod
    def __call__(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """t and end, (count,) float64 each, 0 <= end <= t <= π/2, on the generator's device."""


@dataclass(frozen=True, kw_only=True)
class UniformEnd(TimePairDistribution):
    """t from a distribution of its own; end uniform between 0 and t in rectified flow's u.

    Each end is 0 with probability fraction_zero, as in one-step sampling, and t with probability
    fraction_equal, where a flow map is a velocity.
    """

    times: LogNormal
    """Distribution of t."""
    fraction_zero: float = 0.25
    """Probability of end = 0."""
    fraction_equal: float = 0.25
    """Probability of end = t."""

    def __post_init__(self) -> None:
        require_number("[]", 0, 1, fraction_zero=self.fraction_zero)
        require_number("[]", 0, 1, fraction_equal=self.fraction_equal)
        if self.fraction_zero + self.fraction_equal > 1:
            raise ValueError(
                f"fraction_zero is {self.fraction_zero} and fraction_equal {self.fraction_equal}; "
                "their sum must not exceed 1"
            )

    def __call__(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        t = self.times(count, generator)
        end = torch.minimum(t_from_u(_uniform(count, generator) * u_from_t(t)), t)
        kind = _uniform(count, generator)
        end = torch.where(kind < self.fraction_zero, 0.0, end)
        return t, torch.where(kind >= 1 - self.fraction_equal, t, end)


@dataclass(frozen=True, kw_only=True)
class SortedPair(TimePairDistribution):
    """The larger of two independent times is t, the smaller is end (MeanFlow, 2505.13447 §4.3).

    The MeanFlow papers draw LogNormal(mean=-0.4, std=1). end = t for 75 % of the pairs in MeanFlow
    and for 50 % in iMF (2512.02012).
    """

    times: LogNormal
    """Distribution of both times."""
    fraction_equal: float
    """Probability that end is replaced by t."""

    def __post_init__(self) -> None:
        require_number("[]", 0, 1, fraction_equal=self.fraction_equal)

    def __call__(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        first, second = self.times(count, generator), self.times(count, generator)
        t = torch.maximum(first, second)
        equal = _uniform(count, generator) < self.fraction_equal
        return t, torch.where(equal, t, torch.minimum(first, second))


@dataclass(frozen=True, kw_only=True)
class TruncatedEnd(TimePairDistribution):
    """The gap in u first, then end below 1 - gap (TVM, 2511.19797).

    logit(gap) ~ N(gap_mean, gap_std²), logit(end) ~ N(end_mean, end_std²) given that
    end < 1 - gap, and t = end + gap, all in rectified flow's u.
    """

    gap_mean: float = -0.8
    """Mean of logit(gap)."""
    gap_std: float = 1.0
    """Standard deviation of logit(gap)."""
    end_mean: float = -0.4
    """Mean of logit(end) before the truncation."""
    end_std: float = 1.0
    """Standard deviation of logit(end) before the truncation."""

    def __post_init__(self) -> None:
        require_number(
            "[]", -MAX_LOG_SIGMA, MAX_LOG_SIGMA, gap_mean=self.gap_mean, end_mean=self.end_mean
        )
        require_number("(]", 0, MAX_LOG_SIGMA, gap_std=self.gap_std, end_std=self.end_std)

    def __call__(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        normal = torch.randn(
            count, generator=generator, device=generator.device, dtype=torch.float64
        )
        logit_gap = self.gap_mean + self.gap_std * normal
        # end < 1 - gap is logit(end) < -logit(gap); the inverse CDF draws from the normal below it.
        highest = torch.special.ndtr((-logit_gap - self.end_mean) / self.end_std)
        below = torch.special.ndtri(_uniform(count, generator) * highest)
        u_end = torch.sigmoid(self.end_mean + self.end_std * below)
        t = t_from_u(torch.clamp(u_end + torch.sigmoid(logit_gap), max=1))
        return t, torch.minimum(t_from_u(u_end), t)


def _uniform(count: int, generator: Generator) -> Tensor:
    """Uniform in [0, 1): (count,) float64."""
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
