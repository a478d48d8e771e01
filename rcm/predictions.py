"""TrigFlow's F from the prediction of any diffusion network, and the prediction from F.

A network receives the input a·x0 + s·ε with ε ~ N(0, 1) and predicts some p·x0 + q·ε:

    prediction     p   q      det = a q - s p
    "x0"           1   0      -s
    "eps"          0   1       a
    "v"           -s   a       a² + s²         (progressive distillation, 2202.00512)
    "flow"        -1   1       a + s           (rectified flow: a = 1 - u, s = u)

With n² = σd² a² + s² and tan(t) = s / (σd a), the input is n x. F = cos(t) ε - sin(t) x0/σd is

    F = [(n/σd) prediction - (cos(t) p + sin(t) q/σd) input] / det

and the inverse, x0 = σd (cos(t) x - sin(t) F) and ε = sin(t) x + cos(t) F, is

    prediction = (p σd cos(t) + q sin(t)) input/n + (q cos(t) - p σd sin(t)) F.

F determines every prediction. Where det is zero, the prediction does not determine F: eps at pure
noise, x0 without noise. Close to these points F has the error of the prediction divided by cos(t)
or sin(t). For v and flow det is never zero.
"""

from typing import Literal

import torch
from torch import Tensor

from rcm.time_conversions import t_from_signal_noise
from rcm.trigflow import check_like

Prediction = Literal["x0", "eps", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v", "flow")


def _coefficients(kind: Prediction, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of the table above."""
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    if kind == "x0":
        return one, zero
    if kind == "eps":
        return zero, one
    if kind == "v":
        return -noise, signal
    if kind == "flow":
        return -one, one
    raise ValueError(f"prediction {kind!r} is unknown; allowed are {', '.join(PREDICTIONS)}")


def _scaled(factor: Tensor, tensor: Tensor) -> Tensor:
    """factor (batch,) times tensor (batch, ...), in float32 or better."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return factor.to(dtype).view(-1, *[1] * (tensor.ndim - 1)) * tensor


def f_from_prediction(
    prediction: Tensor,
    network_input: Tensor,
    *,
    kind: Prediction,
    signal: Tensor,
    noise: Tensor,
    sigma_data: float = 1.0,
) -> Tensor:
    """TrigFlow's F from a network's prediction at network_input = signal·x0 + noise·ε.

    prediction, network_input: (batch, ...) in the network's units; signal (a), noise (s):
    (batch,), preferably float64. Returns F (batch, ...) at t = atan(s / (σd a)), in units of σd.
    Raises ValueError for an unknown kind or unequal shapes.
    """
    check_like("prediction", prediction, "network_input", network_input)
    p, q = _coefficients(kind, signal, noise)
    t = t_from_signal_noise(signal, noise, sigma_data)
    det = signal * q - noise * p
    of_prediction = torch.hypot(sigma_data * signal, noise) / (sigma_data * det)
    of_input = -(torch.cos(t) * p + torch.sin(t) * q / sigma_data) / det
    return _scaled(of_prediction, prediction) + _scaled(of_input, network_input)


def prediction_from_f(
    f: Tensor,
    network_input: Tensor,
    *,
    kind: Prediction,
    signal: Tensor,
    noise: Tensor,
    sigma_data: float = 1.0,
) -> Tensor:
    """The inverse of `f_from_prediction`: f (batch, ...) in units of σd -> prediction (batch, ...).

    Unlike its inverse, it is defined for every kind at every noise level. Raises ValueError for an
    unknown kind or unequal shapes.
    """
    check_like("f", f, "network_input", network_input)
    p, q = _coefficients(kind, signal, noise)
    t = t_from_signal_noise(signal, noise, sigma_data)
    cos, sin = torch.cos(t), torch.sin(t)
    of_input = (p * sigma_data * cos + q * sin) / torch.hypot(sigma_data * signal, noise)
    of_f = q * cos - p * sigma_data * sin
    return _scaled(of_input, network_input) + _scaled(of_f, f)
