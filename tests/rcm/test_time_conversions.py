"""Conversions between the time variables of TrigFlow, EDM, rectified flow and DDPM."""

import pytest
import torch
from torch import Tensor

from rcm.time_conversions import (
    VPSchedule,
    sigma_from_t,
    t_from_sigma,
    t_from_signal_noise,
    t_from_u,
    u_from_t,
)
from rcm.trigflow import interpolate

SIGMA = torch.logspace(-3, 3, 13, dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_conversions_invert_each_other(sigma_data: float) -> None:
    t = t_from_sigma(SIGMA, sigma_data)
    torch.testing.assert_close(sigma_from_t(t, sigma_data), SIGMA)
    torch.testing.assert_close(t_from_u(u_from_t(t, sigma_data), sigma_data), t)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_conversions_keep_the_signal_to_noise_ratio(sigma_data: float) -> None:
    t = t_from_sigma(SIGMA, sigma_data)
    u = u_from_t(t, sigma_data)
    torch.testing.assert_close(u / (1 - u), SIGMA)
    torch.testing.assert_close(t_from_signal_noise(1 - u, u, sigma_data), t)


def test_edm_and_rectified_flow_are_the_same_path_rescaled(times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    x, t = interpolate(x0, noise, times), times[:, None]
    u = u_from_t(t)
    torch.testing.assert_close((1 - u) * x0 + u * noise, x / (torch.cos(t) + torch.sin(t)))
    torch.testing.assert_close((x0 + sigma_from_t(t) * noise)[:-1], (x / torch.cos(t))[:-1])


SCHEDULES = {
    "linear": VPSchedule.linear(),
    "scaled_linear": VPSchedule.scaled_linear(),
    "zero terminal SNR": VPSchedule(torch.tensor([0.99, 0.8, 0.3, 0.0])),
    "no noise at first": VPSchedule(torch.tensor([1.0, 0.8, 0.3])),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_vp_timesteps_and_t_invert_each_other(schedule: VPSchedule) -> None:
    timestep = torch.linspace(0, len(schedule.times) - 1, 5003, dtype=torch.float64)
    t = schedule.t(timestep)
    assert bool((t.diff() > 0).all())
    torch.testing.assert_close(schedule.timestep(t), timestep, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(schedule.t(schedule.timestep(t)), t, atol=1e-12, rtol=1e-12)


def test_integer_timesteps_have_the_signal_and_noise_of_the_table() -> None:
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = VPSchedule(alphas_cumprod).t(torch.arange(1000))
    torch.testing.assert_close(torch.cos(t), alphas_cumprod.sqrt())
    torch.testing.assert_close(torch.sin(t), (1 - alphas_cumprod).sqrt())


@pytest.mark.parametrize(
    ("name", "start", "end"), [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)]
)
def test_schedules_are_those_of_diffusers(name: str, start: float, end: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    expected = VPSchedule(theirs.alphas_cumprod).times
    torch.testing.assert_close(SCHEDULES[name].times, expected, atol=1e-5, rtol=0)


@every_schedule
def test_the_tangent_of_a_vp_timestep_is_its_slope(schedule: VPSchedule) -> None:
    t = (schedule.times[1:] + schedule.times[:-1]) / 2
    _, slope = torch.func.jvp(schedule.timestep, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, 1 / schedule.times.diff())
    _, slope = torch.func.jvp(schedule.t, (schedule.timestep(t),), (torch.ones_like(t),))
    torch.testing.assert_close(slope, schedule.times.diff())


def test_vp_times_in_float32_are_within_the_schedule() -> None:
    """The float32 nearest to π/2 is above π/2."""
    schedule = SCHEDULES["zero terminal SNR"]
    timestep = schedule.timestep(schedule.times.float())
    expected = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(timestep, expected, atol=1e-6, rtol=0)


def test_vp_times_outside_of_the_schedule_raise() -> None:
    schedule = SCHEDULES["scaled_linear"]
    with pytest.raises(ValueError, match=r"timestep lies in \[3, 1000\].* in \[0, 999\]"):
        schedule.t(torch.tensor([3, 1000]))
    with pytest.raises(ValueError, match=r"t lies in \[1.5708, 1.5708\].*\[0.0291.*, 1.502.*\]"):
        schedule.timestep(torch.tensor([torch.pi / 2]))
    with pytest.raises(ValueError, match="t lies in"):
        schedule.timestep(torch.tensor([float("nan")]))


def test_invalid_vp_schedules_raise() -> None:
    with pytest.raises(ValueError, match=r"shape \(1,\); expected"):
        VPSchedule(torch.tensor([0.5]))
    for values in ([0.5, 0.5], [0.3, 0.5], [1.1, 0.5], [0.5, -0.1], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="decrease strictly"):
            VPSchedule(torch.tensor(values))
    with pytest.raises(ValueError, match="betas must lie"):
        VPSchedule.linear(0.0, 0.02)
