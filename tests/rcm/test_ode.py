"""Steps along ODEs that have closed-form solutions: of a Gaussian and of a single data point."""

import math

import pytest
import torch
from torch import Tensor

from rcm.ode import Solver, ode_step
from rcm.trigflow import Network, denoise, interpolate, velocity
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


def follow(net: Network, x: Tensor, start: float, end: float, steps: int, solver: Solver) -> Tensor:
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64)[:, None].expand(-1, len(x))
    for i in range(steps):
        x = ode_step(net, x, times[i], times[i + 1], None, solver)
    return x


@pytest.mark.parametrize(("start", "end"), [(1.5, 0.2), (0.2, 1.5)])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_order_of_the_error_in_both_directions(
    solver: Solver, order: int, start: float, end: float, gaussian: Gaussian
) -> None:
    x = torch.randn(9, 2, dtype=torch.float64)
    t, t_end = (torch.full((9,), time, dtype=torch.float64) for time in (start, end))
    centred = (x - torch.cos(t)[:, None] * gaussian.mean) / gaussian.spread(t, x)
    exact = torch.cos(t_end)[:, None] * gaussian.mean + gaussian.spread(t_end, x) * centred
    errors = torch.stack(
        [
            (follow(gaussian.velocity, x, start, end, steps, solver) - exact).abs().max()
            for steps in (100, 200, 400)
        ]
    )
    measured = torch.log2(errors[:-1] / errors[1:])
    torch.testing.assert_close(measured, torch.full_like(measured, order), atol=0.1, rtol=0)


def test_ddim_is_exact_for_a_single_data_point() -> None:
    """Each sample has its own data point x0 and its own times."""
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        sin = torch.sin(t)[:, None]
        return velocity(x0, (x - torch.cos(t)[:, None] * x0) / sin, t)

    t = torch.linspace(0.1, torch.pi / 2, 6, dtype=torch.float64)
    for t_next in (t.flip(0), torch.zeros_like(t)):
        step = ode_step(net, interpolate(x0, noise, t), t, t_next, None, "ddim")
        torch.testing.assert_close(step, interpolate(x0, noise, t_next))


def test_ddim_step_to_zero_is_the_denoiser() -> None:
    net, x = SmoothNetwork(5).double(), torch.randn(6, 5, dtype=torch.float64)
    t = torch.linspace(0, torch.pi / 2, 6, dtype=torch.float64)
    step = ode_step(net, x, t, torch.zeros_like(t), None, "ddim")
    torch.testing.assert_close(step, denoise(net, x, t, None))


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun"])
def test_gradients_flow_through_all_evaluations(solver: Solver) -> None:
    """For F = w x, Heun's step is (1 + w dt + (w dt)²/2) x."""
    dt, w = -0.4, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, 1, dtype=torch.float64)
    t, t_next = torch.tensor([1.0, 1.0 + dt], dtype=torch.float64)[:, None]
    ode_step(lambda x, t, condition: w * x, x, t, t_next, None, solver).sum().backward()
    expected = {"euler": dt, "ddim": math.sin(dt), "heun": dt + 0.7 * dt**2}[solver]
    torch.testing.assert_close(w.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun"])
def test_networks_receive_precise_times_and_results_keep_their_dtype(solver: Solver) -> None:
    seen = []

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        seen.extend([x.dtype, t.dtype])
        return x

    x = torch.ones(1, 2, dtype=torch.bfloat16)
    t, t_next = torch.tensor([1.0, 0.6], dtype=torch.float64)[:, None]
    assert ode_step(net, x, t, t_next, None, solver).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.float32] * (2 if solver == "heun" else 1)


def test_invalid_arguments_raise(gaussian: Gaussian) -> None:
    x, t = torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    with pytest.raises(ValueError, match="solver is 'rk4'; it must be one of euler, ddim, heun"):
        ode_step(gaussian.velocity, x, t, t, None, "rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one time per sample"):
        ode_step(gaussian.velocity, x, t, t[:1], None)
    with pytest.raises(ValueError, match="t lies in"):
        ode_step(gaussian.velocity, x, t, t - 1, None)
    with pytest.raises(ValueError, match="bfloat16"):
        ode_step(gaussian.velocity, x, t.bfloat16(), t, None)
