"""Convert any diffusion network to a TrigFlow network: eps-, v-, x0-, flow-prediction, guidance.

A network receives the input a·x0 + s·ε with ε ~ N(0, 1) and predicts some p·x0 + q·ε:

    prediction     p   q      det = a q - s p
    "x0"           1   0      -s
    "eps"          0   1       a
    "v"           -s   a       a² + s²         (progressive distillation, 2202.00512)
    "flow"        -1   1       a + s           (rectified flow: a = 1 - u, s = u)

These two linear equations determine x0 and ε. With n² = σd² a² + s², F = cos(t) ε - sin(t) x0/σd is

    F = [(n/σd) prediction - (cos(t) p + sin(t) q/σd) input] / det,     input = n x.

Where det is zero, the prediction does not determine F: eps at pure noise, x0 without noise. It is
never zero for flow and v. For flow with σd = 1, u = S/Z, C = cos t, S = sin t, Z = C + S, F is

    F = ((C - S)/Z) x + v/Z.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.time_conversions import t_from_signal_noise, u_from_t
from rcm.trigflow import Network, check_like

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

    def scale(factor: Tensor, tensor: Tensor) -> Tensor:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        return factor.to(dtype).view(-1, *[1] * (tensor.ndim - 1)) * tensor

    return scale(of_prediction, prediction) + scale(of_input, network_input)


def from_rectified_flow(net: Network, time_scale: float = 1.0) -> Network:
    """Wrap a rectified-flow network net(x_u, time_scale·u, condition) -> ε - x0 for TrigFlow.

    σd = 1. The conversion is exact for every t in [0, π/2] and never divides by sin(t). It is
    differentiable, so a student can stay a rectified-flow network and train with TrigFlow losses.
    `time_scale` is 1000 for most published models.
    """

    def wrapped(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        u = u_from_t(t)
        scale = (torch.cos(t) + torch.sin(t)).view(-1, *[1] * (x.ndim - 1))
        x_u = (x / scale).to(x.dtype)
        prediction = net(x_u, time_scale * u, condition)
        return f_from_prediction(prediction, x_u, kind="flow", signal=1 - u, noise=u)

    return wrapped


def guided(net: Network, null_condition: Callable[[Any], Any], scale: float) -> Network:
    """Classifier-free guidance (2207.12598): F_u + w (F_c - F_u); w = 1 is no guidance.

    null_condition maps a batch's condition to the empty (or negative) condition of that batch.
    """

    def wrapped(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        unconditional = net(x, t, null_condition(condition))
        return unconditional + scale * (net(x, t, condition) - unconditional)

    return wrapped
