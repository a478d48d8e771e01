"""Distributions of the two times of a flow map."""

import pytest
import torch
from torch import Tensor

from rcm.time_conversions import u_from_t
from rcm.time_pairs import SortedPair, TimePairDistribution, TruncatedEnd, UniformEnd
from rcm.time_sampling import LogNormal

COUNT = 200_000
LOGIT_NORMAL = LogNormal(mean=-0.4, std=1.0)
PAIRS = [
    UniformEnd(times=LogNormal(mean=0.0, std=1.6)),
    SortedPair(times=LOGIT_NORMAL, fraction_equal=0.5),
    TruncatedEnd(),
]


def logit(t: Tensor) -> Tensor:
    return torch.logit(u_from_t(t))


def normal_quantiles(values: Tensor, mean: float, std: float) -> Tensor:
    """Φ((x - mean)/std), which is uniform if x is that normal."""
    return torch.special.ndtr((values - mean) / std)


def assert_uniform(values: Tensor) -> None:
    """Kolmogorov-Smirnov: the largest error of the empirical distribution function."""
    expected = torch.linspace(0, 1, len(values), dtype=torch.float64)
    assert (values.sort().values - expected).abs().max() < 2.5 / len(values) ** 0.5


@pytest.mark.parametrize("pairs", PAIRS, ids=lambda p: type(p).__name__)
def test_pairs_are_ordered_float64_times(
    pairs: TimePairDistribution, generator: torch.Generator
) -> None:
    t, end = pairs(COUNT, generator)
    assert t.shape == end.shape == (COUNT,)
    assert t.dtype == end.dtype == torch.float64
    assert (end >= 0).all() and (end <= t).all() and (t <= torch.pi / 2).all()
    assert (end < t).any()


@pytest.mark.parametrize("pairs", PAIRS, ids=lambda p: type(p).__name__)
def test_the_generator_determines_the_pairs(pairs: TimePairDistribution) -> None:
    first, second = (pairs(8, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("pairs", PAIRS, ids=lambda p: type(p).__name__)
def test_samples_are_independent_and_identically_distributed(
    pairs: TimePairDistribution, generator: torch.Generator
) -> None:
    """Every position of a batch has the same distribution; no share of the batch is fixed."""
    draws = [pairs(2, generator) for _ in range(4000)]
    difference = torch.stack([t - end for t, end in draws])
    first, second = difference.unbind(1)
    assert abs(first.mean() - second.mean()) < 0.03
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06


def test_uniform_end_draws_t_from_its_distribution_and_end_uniform_in_u(
    generator: torch.Generator,
) -> None:
    pairs = UniformEnd(times=LogNormal(mean=-0.3, std=1.6), fraction_zero=0.1, fraction_equal=0.3)
    t, end = pairs(COUNT, generator)
    assert_uniform(normal_quantiles(logit(t), -0.3, 1.6))
    zero, equal = end == 0, end == t
    assert abs(zero.double().mean() - 0.1) < 0.003
    assert abs(equal.double().mean() - 0.3) < 0.005
    between = ~zero & ~equal
    assert_uniform((u_from_t(end) / u_from_t(t))[between])
    for kind in (zero, equal, between):  # the kind is independent of t
        assert_uniform(normal_quantiles(logit(t[kind]), -0.3, 1.6))


def test_uniform_end_at_the_limits_of_its_fractions(generator: torch.Generator) -> None:
    times = LogNormal(mean=0.0, std=1.6)
    t, end = UniformEnd(times=times, fraction_zero=1, fraction_equal=0)(1000, generator)
    assert (end == 0).all()
    t, end = UniformEnd(times=times, fraction_zero=0, fraction_equal=1)(1000, generator)
    assert (end == t).all()
    t, end = UniformEnd(times=times, fraction_zero=0, fraction_equal=0)(1000, generator)
    assert (end > 0).all() and (end < t).all()


def test_sorted_pairs_are_the_order_statistics_of_two_draws(generator: torch.Generator) -> None:
    """The largest of two has distribution function Φ², the smallest 1 - (1 - Φ)²."""
    t, end = SortedPair(times=LOGIT_NORMAL, fraction_equal=0.4)(COUNT, generator)
    assert_uniform(normal_quantiles(logit(t), -0.4, 1.0) ** 2)
    equal = end == t
    assert abs(equal.double().mean() - 0.4) < 0.005
    assert_uniform(1 - (1 - normal_quantiles(logit(end[~equal]), -0.4, 1.0)) ** 2)
    assert_uniform(normal_quantiles(logit(end[equal]), -0.4, 1.0) ** 2)


def test_logit_normal_u_is_log_normal_sigma(generator: torch.Generator) -> None:
    assert_uniform(normal_quantiles(logit(LOGIT_NORMAL(COUNT, generator)), -0.4, 1.0))


def test_truncated_end_has_a_logit_normal_gap_and_end_below_one_minus_gap(
    generator: torch.Generator,
) -> None:
    t, end = TruncatedEnd(gap_mean=-0.8, gap_std=1.1, end_mean=-0.4, end_std=0.9)(COUNT, generator)
    gap = u_from_t(t) - u_from_t(end)
    assert_uniform(normal_quantiles(torch.logit(gap), -0.8, 1.1))
    below = normal_quantiles(logit(end), -0.4, 0.9)
    highest = normal_quantiles(torch.logit(1 - gap), -0.4, 0.9)
    assert (below <= highest).all()
    assert_uniform(below / highest)


@pytest.mark.parametrize("gap_mean", [-50, -20, 50])
def test_truncated_end_is_finite_and_ordered_for_extreme_gaps(
    gap_mean: float, generator: torch.Generator
) -> None:
    t, end = TruncatedEnd(gap_mean=gap_mean, gap_std=5, end_mean=5, end_std=5)(20_000, generator)
    assert t.isfinite().all() and end.isfinite().all()
    assert (end <= t).all()


def test_invalid_pairs_raise() -> None:
    times = LogNormal(mean=0.0, std=1.6)
    with pytest.raises(ValueError, match=r"fraction_zero is -0\.1; it must be a number in \[0, 1"):
        UniformEnd(times=times, fraction_zero=-0.1)
    with pytest.raises(ValueError, match="their sum must not exceed 1"):
        UniformEnd(times=times, fraction_zero=0.6, fraction_equal=0.6)
    with pytest.raises(TypeError, match=r"fraction_equal is '0\.5'"):
        SortedPair(times=times, fraction_equal="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction_equal is nan"):
        SortedPair(times=times, fraction_equal=float("nan"))
    with pytest.raises(ValueError, match=r"gap_std is 0; it must be a number in \(0, 50\]"):
        TruncatedEnd(gap_std=0)
    with pytest.raises(ValueError, match="end_mean is inf"):
        TruncatedEnd(end_mean=float("inf"))
