"""The TrigFlow path and its checks."""

import pytest
import torch
from torch import Tensor

from rcm.trigflow import (
    check_times,
    denoised,
    interpolate,
    network_time,
    velocity,
)


def test_velocity_is_the_derivative_of_the_path(times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    _, derivative = torch.func.jvp(
        lambda t: interpolate(x0, noise, t), (times,), (torch.ones_like(times),)
    )
    torch.testing.assert_close(velocity(x0, noise, times), derivative)


def test_true_velocity_denoises_exactly(times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    x, f = interpolate(x0, noise, times), velocity(x0, noise, times)
    torch.testing.assert_close(denoised(x, f, times), x0)


def test_networks_receive_time_in_float32_or_float64() -> None:
    t = torch.tensor([0.3], dtype=torch.float64)
    assert network_time(t, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert network_time(t, torch.zeros(1)).dtype == torch.float32
    assert network_time(t, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="bfloat16; allowed are float32"):
        network_time(t.bfloat16(), torch.zeros(1))


def test_invalid_times_raise() -> None:
    check_times(torch.tensor([0.0, torch.pi / 2]), 2)
    with pytest.raises(ValueError, match=r"t lies in \[-0.1, 2\]"):
        check_times(torch.tensor([-0.1, 2.0]), 2)
    with pytest.raises(ValueError, match="t lies in"):
        check_times(torch.tensor([float("nan"), 1.0]), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        check_times(torch.zeros(2, 1), 2)
