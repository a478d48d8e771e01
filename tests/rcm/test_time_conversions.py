"""Conversions between the time variables of TrigFlow, EDM and rectified flow."""

import pytest
import torch
from torch import Tensor

from rcm.time_conversions import (
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
