"""The TrigFlow path and its checks."""

import pytest
import torch
from torch import Tensor

from rcm.trigflow import (
    check_times,
    denoise,
    denoised,
    flow_map,
    interpolate,
    network_time,
    velocity,
)
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


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


def test_flow_map_to_its_own_time_is_the_identity_and_to_zero_the_consistency_function(
    times: Tensor,
) -> None:
    net, x = SmoothNetwork(5).double(), torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(flow_map(net, x, times, times, None), x)
    zero = torch.zeros_like(times)
    consistency = denoise(lambda x, t, c: net(x, t, c, end=zero), x, times, None)
    torch.testing.assert_close(flow_map(net, x, times, zero, None), consistency, atol=0, rtol=0)


def test_a_flow_map_starts_with_the_velocity_of_its_network(times: Tensor) -> None:
    """df/ds = F(x, t, t) at s = t."""
    net, x = SmoothNetwork(5).double(), torch.randn(7, 5, dtype=torch.float64)
    t = times.clamp(min=1e-4)
    step = flow_map(net, x, t, t - 1e-7, None) - x
    torch.testing.assert_close(-step / 1e-7, net(x, t, end=t), atol=1e-6, rtol=0)


def test_closed_form_flow_map_of_a_gaussian(gaussian: Gaussian, times: Tensor) -> None:
    """It ends on the ODE, composes, and F is continuous up to the velocity at end = t."""
    x = torch.randn(7, 5, dtype=torch.float64)
    for share in (0.0, 0.3, 1 - 1e-9, 1.0):
        f = flow_map(gaussian.flow_map_network, x, times, share * times, None)
        torch.testing.assert_close(f, gaussian.ode_point(x, times, share * times))
        onward = gaussian.ode_end(f, share * times)
        torch.testing.assert_close(onward, gaussian.ode_end(x, times))
    v = gaussian.velocity(x, times)
    torch.testing.assert_close(gaussian.flow_map_network(x, times, end=times), v)
    close = gaussian.flow_map_network(x, times, end=(1 - 1e-9) * times)
    torch.testing.assert_close(close, v, atol=1e-7, rtol=0)


def test_the_gaussians_ode_follows_its_velocity(gaussian: Gaussian, times: Tensor) -> None:
    x, t = torch.randn(7, 5, dtype=torch.float64), times
    _, slope = torch.func.jvp(
        lambda end: gaussian.ode_point(x, t, end), (t / 2,), (torch.ones_like(t),)
    )
    point = gaussian.ode_point(x, t, t / 2)
    torch.testing.assert_close(slope, gaussian.velocity(point, t / 2))


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


def test_invalid_ends_raise() -> None:
    net, x = SmoothNetwork(5), torch.randn(3, 5)
    t = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
    flow_map(net, x, t, t.float(), None)  # rounding to float32 lifts some ends above t
    with pytest.raises(ValueError, match=r"end has shape \(3, 1\), but t has \(3,\)"):
        flow_map(net, x, t, t[:, None], None)
    with pytest.raises(ValueError, match=r"max\(end - t\) is 0.1; .* lies in \[0, t\]"):
        flow_map(net, x, t, t + 0.1, None)
    with pytest.raises(ValueError, match=r"min\(end\) is -0.7"):
        flow_map(net, x, t, t - 1, None)
    with pytest.raises(ValueError, match=r"min\(end\) is nan"):
        flow_map(net, x, t, torch.tensor([0.1, float("nan"), 0.2]), None)
    with pytest.raises(ValueError, match="bfloat16"):
        flow_map(net, x, t, t.bfloat16(), None)
