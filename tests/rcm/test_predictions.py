"""Every prediction type converts to the same F, and back."""

import pytest
import torch

from rcm.predictions import PREDICTIONS, Prediction, f_from_prediction, prediction_from_f
from rcm.time_conversions import t_from_signal_noise
from rcm.trigflow import velocity


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("path", ["variance preserving", "rectified flow", "variance exploding"])
def test_f_and_every_prediction_determine_each_other_on_every_path(
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
    x, f = (
        a * x0 + s * eps,
        velocity(x0 / sigma_data, eps, t_from_signal_noise(signal, noise, sigma_data)),
    )
    predicted = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[kind]
    levels = {"kind": kind, "signal": signal, "noise": noise, "sigma_data": sigma_data}
    torch.testing.assert_close(f_from_prediction(predicted, x, **levels), f)
    torch.testing.assert_close(prediction_from_f(f, x, **levels), predicted)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_f_determines_every_prediction_even_without_noise_and_at_pure_noise(
    kind: Prediction, signal: float, noise: float
) -> None:
    x0, eps = torch.randn(2, 1, 4, dtype=torch.float64)
    predicted = {"x0": x0, "eps": eps, "v": signal * eps - noise * x0, "flow": eps - x0}[kind]
    a, s = torch.tensor([[signal], [noise]], dtype=torch.float64)
    f = velocity(x0, eps, t_from_signal_noise(a, s))
    actual = prediction_from_f(f, signal * x0 + noise * eps, kind=kind, signal=a, noise=s)
    torch.testing.assert_close(actual, predicted)


def test_unknown_predictions_and_unequal_shapes_raise() -> None:
    x, a = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="'score' is unknown; allowed are x0, eps, v, flow"):
        f_from_prediction(x, x, kind="score", signal=a, noise=a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be equal"):
        f_from_prediction(x, x[:1], kind="eps", signal=a, noise=a)
    with pytest.raises(ValueError, match="must be equal"):
        prediction_from_f(x, x[:1], kind="eps", signal=a, noise=a)
