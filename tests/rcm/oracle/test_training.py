"""Time distributions and the decay of the averaged weights agree with rCM's published code."""

import pytest
import torch
from torch import Tensor

from rcm.time_conversions import u_from_t
from rcm.time_sampling import LogNormal, ShiftedUniform, TimeDistribution
from rcm.training.ema import power_decay, power_gamma
from tests.rcm.oracle.stand_in import ORACLE, assert_recorded


def draw(distribution: TimeDistribution, recorded: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Times from recorded normal or uniform numbers."""
    numbers = ORACLE[recorded].flatten()
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *size, **options: numbers)
    return distribution(len(numbers), torch.Generator())


@pytest.mark.parametrize(("name", "mean"), [("pG_0p7", 0.7), ("pG_1p5", 1.5)])
def test_times_of_the_consistency_loss(
    name: str, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = LogNormal(mean=mean, std=1.6)
    t = draw(distribution, "time_normals", monkeypatch)
    assert_recorded(f"{name}_t", t)
    assert_recorded(f"{name}_u", u_from_t(t))
    if mean == 0.7:
        assert_recorded("scm_t", draw(distribution, "scm_normal", monkeypatch))


def test_times_of_the_score_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = ShiftedUniform(shift=5.0)
    t = draw(distribution, "time_uniforms", monkeypatch)
    assert_recorded("pD_t", t)
    assert_recorded("pD_u", u_from_t(t))
    assert_recorded("dmd_t", draw(distribution, "d_uniform", monkeypatch))


@pytest.mark.parametrize(("name", "rate"), [("ema_0p1", 0.1), ("ema_0p05", 0.05)])
def test_decay_of_the_average(name: str, rate: float) -> None:
    """Their iterations count from 0, our updates from 1."""
    assert_recorded(f"{name}_gamma", torch.tensor(power_gamma(rate), dtype=torch.float64))
    decay = power_decay(rate)
    betas = [decay(int(i) + 1) for i in ORACLE["ema_iterations"].tolist()]
    assert_recorded(f"{name}_beta", torch.tensor(betas, dtype=torch.float64))
