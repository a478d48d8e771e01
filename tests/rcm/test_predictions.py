"""Every prediction type converts to the same F."""

import pytest
import torch
from torch import Tensor

from rcm.guidance import guided
from rcm.losses.consistency import consistency_tangent
from rcm.network_conversions import from_rectified_flow
from rcm.predictions import PREDICTIONS, Prediction, f_from_prediction
from rcm.time_conversions import t_from_signal_noise, u_from_t
from rcm.trigflow import interpolate, velocity
from tests.rcm.analytic_networks import SmoothNetwork


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("path", ["variance preserving", "rectified flow", "variance exploding"])
def test_f_of_every_prediction_on_every_path(
    path: str, kind: Prediction, sigma_data: float
) -> None:
    u = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    signal, noise = {
        "variance preserving": (torch.cos(u), torch.sin(u)),
        "rectified flow": (1 - u, u),
        "variance exploding": (torch.ones_like(u), 10 * u),
    }[path]
    x0, eps = torch.randn(2, 6, 4, dtype=torch.float64)
    x0 = sigma_data * x0
    a, s = signal[:, None], noise[:, None]
    predicted = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[kind]
    f = f_from_prediction(
        predicted, a * x0 + s * eps, kind=kind, signal=signal, noise=noise, sigma_data=sigma_data
    )
    t = t_from_signal_noise(signal, noise, sigma_data)
    torch.testing.assert_close(f, velocity(x0 / sigma_data, eps, t))


def test_rectified_flow_wrapper_is_exact_and_finite_at_both_ends(times: Tensor) -> None:
    net = SmoothNetwork(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    c, s = torch.cos(times)[:, None], torch.sin(times)[:, None]
    z = c + s
    literal = (c - s) / z * x + net(x / z, u_from_t(times)) / z
    torch.testing.assert_close(from_rectified_flow(net)(x, times, None), literal)


def test_rectified_flow_wrapper_scales_time_for_the_network(times: Tensor) -> None:
    seen = []

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        seen.append(t)
        return x

    from_rectified_flow(net, time_scale=1000)(torch.zeros(7, 4), times, None)
    torch.testing.assert_close(seen[0], (1000 * u_from_t(times)).float())


def test_tangent_of_a_wrapped_flow_network_equals_the_rectified_flow_formula(times: Tensor) -> None:
    """g = C h / Z², where h = V - v - u J differentiates x_u - u v along (V, 1)."""
    student, teacher = SmoothNetwork(4).double(), SmoothNetwork(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    c, s = torch.cos(times)[:, None], torch.sin(times)[:, None]
    z = c + s
    u = u_from_t(times)
    flow = teacher(x / z, u)
    v, j = torch.func.jvp(student, (x / z, u), (flow, torch.ones_like(u)))
    h = flow - v - u[:, None] * j

    teacher_f = from_rectified_flow(teacher)(x, times, None)
    wrapped = consistency_tangent(from_rectified_flow(student), x, times, teacher_f, None)
    torch.testing.assert_close(wrapped.g, c * h / z**2, atol=1e-10, rtol=1e-10)


def test_guidance_extrapolates_from_the_null_condition() -> None:
    def net(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * condition

    x, condition = torch.ones(2, 3), torch.tensor([[3.0], [5.0]])
    f = guided(net, torch.zeros_like, 4.0)(x, torch.zeros(2), condition)
    torch.testing.assert_close(f, 4.0 * condition * x)


def test_unknown_predictions_and_unequal_shapes_raise() -> None:
    x, a = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="'score' is unknown; allowed are x0, eps, v, flow"):
        f_from_prediction(x, x, kind="score", signal=a, noise=a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be equal"):
        f_from_prediction(x, x[:1], kind="eps", signal=a, noise=a)


def test_wrapped_flow_network_predicts_the_trigflow_velocity() -> None:
    """For the exact prediction ε - x0."""
    x0, eps = torch.randn(2, 7, 4, dtype=torch.float64)
    t = torch.linspace(0, torch.pi / 2, 7, dtype=torch.float64)
    f = from_rectified_flow(lambda x, t, condition: eps - x0)(interpolate(x0, eps, t), t, None)
    torch.testing.assert_close(f, velocity(x0, eps, t))
