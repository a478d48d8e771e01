"""Metrics against closed forms."""

import pytest
import torch

from rcm.evaluation.metrics import (
    frechet_distance,
    label_agreement,
    pairwise_diversity,
    same_noise_rmse,
)


def whitened(count: int, dim: int) -> torch.Tensor:
    """Points whose sample mean is exactly 0 and sample covariance exactly the identity."""
    x = torch.randn(count, dim, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


def test_distance_of_a_set_to_itself_is_zero() -> None:
    x = torch.randn(50, 8)
    assert abs(frechet_distance(x, x)) < 1e-9


def test_distance_of_a_shift_is_its_square() -> None:
    x, shift = torch.randn(50, 8, dtype=torch.float64), torch.arange(8.0).double()
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()))


def test_distance_of_commuting_covariances_is_that_of_the_standard_deviations() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    x = whitened(60, 3)
    assert frechet_distance(x * a, x * b) == pytest.approx(float((a - b).square().sum()))


def test_distance_of_covariances_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))."""
    x = whitened(60, 2)
    p = torch.tensor([[1.0, 0.3], [0.0, 2.0]], dtype=torch.float64)
    q = torch.tensor([[1.5, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    a, b = p.T @ p, q.T @ q
    cross = (torch.trace(a @ b) + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    expected = torch.trace(a) + torch.trace(b) - 2 * cross
    assert frechet_distance(x @ p, x @ q) == pytest.approx(float(expected))


def test_distance_is_symmetric_and_survives_fewer_samples_than_features() -> None:
    a, b = torch.randn(10, 30), torch.randn(12, 30) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_distance_of_one_feature_is_a_formula_of_scalars() -> None:
    a, b = whitened(40, 1) * 3, whitened(50, 1) + 2
    assert frechet_distance(a, b) == pytest.approx(4 + (3 - 1) ** 2)


def test_rmse_and_agreement() -> None:
    x = torch.zeros(4, 1, 2, 2)
    assert same_noise_rmse(x, x + 3) == pytest.approx(3)
    logits = torch.eye(4)
    assert label_agreement(logits, torch.tensor([0, 1, 2, 0])) == 0.75


def test_diversity_is_within_conditions_only() -> None:
    samples = torch.tensor([[0.0, 0], [2, 2], [100, 100], [100, 100], [7, 7]])
    condition = torch.tensor([0, 0, 1, 1, 2])
    assert pairwise_diversity(samples, condition) == pytest.approx((2 + 0) / 2)


def test_diversity_of_independent_normal_samples_is_the_square_root_of_two() -> None:
    samples = torch.randn(60, 2000)
    condition = torch.arange(60) % 3
    assert pairwise_diversity(samples, condition) == pytest.approx(2**0.5, rel=0.01)


def test_invalid_input_raises() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(x, x / 0 * 0)
    with pytest.raises(ValueError, match="must be equal"):
        same_noise_rmse(x, x[:1])
    with pytest.raises(ValueError, match="must be equal"):
        label_agreement(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one integer"):
        pairwise_diversity(x, torch.zeros(4))
    with pytest.raises(ValueError, match="no condition has two"):
        pairwise_diversity(x, torch.arange(5))
