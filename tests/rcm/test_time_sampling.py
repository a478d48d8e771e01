"""Distributions of the training time."""

import pytest
import torch

from rcm.time_conversions import sigma_from_t, u_from_t
from rcm.time_sampling import LogNormal, ShiftedUniform, rollout_times


def test_log_normal_times_have_normal_log_sigma(generator: torch.Generator) -> None:
    t = LogNormal(mean=-0.5, std=1.4, sigma_data=0.5)(200_000, generator)
    log_sigma = torch.log(sigma_from_t(t, 0.5))
    assert t.dtype == torch.float64
    assert abs(log_sigma.mean() + 0.5) < 0.01
    assert abs(log_sigma.std() - 1.4) < 0.01


def test_shift_moves_the_median_of_uniform_times(generator: torch.Generator) -> None:
    u = u_from_t(ShiftedUniform(shift=5.0)(200_000, generator))
    assert abs(u.median() - 5 / 6) < 0.003
    plain = u_from_t(ShiftedUniform(shift=1.0)(200_000, generator))
    assert abs(plain.mean() - 0.5) < 0.003
    assert abs(plain.std() - 12**-0.5) < 0.003


def test_rollout_times_start_at_pure_noise_and_never_increase(generator: torch.Generator) -> None:
    t = rollout_times(4, 1000, LogNormal(mean=0.0, std=1.6), generator)
    assert t.shape == (4, 1000)
    assert t.dtype == torch.float64
    assert (t[0] == torch.pi / 2).all()
    assert (t.diff(dim=0) <= 0).all()
    assert (t.diff(dim=0) < 0).any()
    with pytest.raises(ValueError, match="at least one step"):
        rollout_times(0, 4, LogNormal(mean=0.0, std=1.6), generator)


def test_invalid_distributions_raise() -> None:
    with pytest.raises(ValueError, match=r"std is 0\.0; it must be a number in \(0, 50\]"):
        LogNormal(mean=0.0, std=0.0)
    with pytest.raises(ValueError, match="mean is nan"):
        LogNormal(mean=float("nan"), std=1.0)
    with pytest.raises(TypeError, match="sigma_data is '1'"):
        LogNormal(mean=0.0, std=1.0, sigma_data="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift"):
        ShiftedUniform(shift=0.0)
