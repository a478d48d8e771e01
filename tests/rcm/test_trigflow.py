"""One path, many clocks."""

import pytest
import torch
from torch import Tensor

from rcm.times import LogNormal, ShiftedUniform
from rcm.trigflow import (
    check_times,
    denoised,
    guard_time,
    interpolate,
    network_time,
    sigma_from_t,
    t_from_sigma,
    t_from_signal_noise,
    t_from_u,
    u_from_t,
    velocity,
)

SIGMA = torch.logspace(-3, 3, 13, dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_clocks_invert_each_other(sigma_data: float) -> None:
    t = t_from_sigma(SIGMA, sigma_data)
    torch.testing.assert_close(sigma_from_t(t, sigma_data), SIGMA)
    torch.testing.assert_close(t_from_u(u_from_t(t, sigma_data), sigma_data), t)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_clocks_agree_on_the_signal_to_noise_ratio(sigma_data: float) -> None:
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


def test_velocity_is_the_derivative_of_the_path(times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    _, derivative = torch.func.jvp(
        lambda t: interpolate(x0, noise, t), (times,), (torch.ones_like(times),)
    )
    torch.testing.assert_close(velocity(x0, noise, times), derivative)


def test_the_true_velocity_denoises_exactly(times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    x, f = interpolate(x0, noise, times), velocity(x0, noise, times)
    torch.testing.assert_close(denoised(x, f, times), x0)


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


def test_a_network_never_sees_time_below_float32() -> None:
    t = torch.tensor([0.3], dtype=torch.float64)
    assert network_time(t, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert network_time(t, torch.zeros(1)).dtype == torch.float32
    assert network_time(t, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="bfloat16; allowed are float32"):
        network_time(t.bfloat16(), torch.zeros(1))


def test_guarded_embedding_refuses_a_cast_inside_the_network() -> None:
    embedding = torch.nn.Identity()
    guard_time(embedding)
    embedding(torch.zeros(3))
    with pytest.raises(ValueError, match="float16"):
        embedding(torch.zeros(3, dtype=torch.float16))


def test_bad_times_are_refused() -> None:
    check_times(torch.tensor([0.0, torch.pi / 2]), 2)
    with pytest.raises(ValueError, match=r"t lies in \[-0.1, 2\]"):
        check_times(torch.tensor([-0.1, 2.0]), 2)
    with pytest.raises(ValueError, match="t lies in"):
        check_times(torch.tensor([float("nan"), 1.0]), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        check_times(torch.zeros(2, 1), 2)


def test_bad_distributions_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        LogNormal(mean=0.0, std=0.0)
    with pytest.raises(ValueError, match="shift"):
        ShiftedUniform(shift=0.0)
