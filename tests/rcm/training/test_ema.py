"""Averages against closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from rcm.training.ema import EMA, constant_decay, power_decay, power_gamma


def parameter_at(module: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        module.weight.fill_(value)
    return module


def averaged(ema: EMA) -> float:
    return float(ema.average["weight"].item())


def test_constant_decay_of_a_constant_is_geometric() -> None:
    module = parameter_at(nn.Linear(1, 1, bias=False), 0.0)
    ema = EMA(module, constant_decay(0.9))
    parameter_at(module, 1.0)
    for _ in range(20):
        ema.update(module)
    assert averaged(ema) == pytest.approx(1 - 0.9**20, rel=1e-5)


def test_power_profile_forgets_the_start_and_weights_time_by_a_power() -> None:
    """For θ_n = n/N the average is ∫ (γ+1) τ^γ τ dτ = (γ+1)/(γ+2)."""
    module = parameter_at(nn.Linear(1, 1, bias=False), 123.0)
    ema = EMA(module, power_decay(0.1))
    steps = 4000
    for n in range(1, steps + 1):
        ema.update(parameter_at(module, n / steps))
    gamma = power_gamma(0.1)
    assert averaged(ema) == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_of_the_published_profiles(std: float, gamma: float) -> None:
    assert power_gamma(std) == pytest.approx(gamma, abs=0.005)


def test_profile_has_the_requested_std() -> None:
    gamma = power_gamma(0.15)
    tau = (np.arange(100_000) + 0.5) / 100_000
    weight = tau**gamma / (tau**gamma).sum()
    mean = (weight * tau).sum()
    assert ((weight * (tau - mean) ** 2).sum()) ** 0.5 == pytest.approx(0.15, rel=1e-4)


def test_own_weights_are_restored_even_after_an_error() -> None:
    module = parameter_at(nn.Linear(1, 1, bias=False), 3.0)
    ema = EMA(module, constant_decay(0.5))
    parameter_at(module, 5.0)

    def sample_and_fail() -> None:
        with ema.applied_to(module):
            assert module.weight.item() == 3.0
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        sample_and_fail()
    assert module.weight.item() == 5.0


def test_small_steps_are_not_lost_in_low_precision() -> None:
    module = parameter_at(nn.Linear(1, 1, bias=False).bfloat16(), 1.0)
    ema = EMA(module, constant_decay(0.999))
    parameter_at(module, 1.0078125)  # the next bfloat16
    for _ in range(500):
        ema.update(module)
    assert averaged(ema) == pytest.approx(1.0078125 - 0.0078125 * 0.999**500, abs=1e-5)


def test_state_survives_a_round_trip() -> None:
    module = nn.Linear(2, 3)
    ema = EMA(module, power_decay(0.1))
    ema.update(module)
    other = EMA(nn.Linear(2, 3), power_decay(0.1))
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    for name, tensor in ema.average.items():
        assert torch.equal(other.average[name], tensor)


def test_different_parameters_raise() -> None:
    ema = EMA(nn.Linear(2, 3), constant_decay(0.9))
    with pytest.raises(ValueError, match=r"parameters of the average are missing: \['bias'\]"):
        ema.update(nn.Linear(2, 3, bias=False))
    with pytest.raises(ValueError, match="weight has shape"):
        ema.update(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="not in the average"):
        EMA(nn.Linear(2, 3, bias=False), constant_decay(0.9)).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        constant_decay(1.0)
    with pytest.raises(ValueError, match=r"std is 0\.3"):
        power_decay(0.3)
