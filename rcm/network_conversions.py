"""Networks of other papers as TrigFlow networks, and TrigFlow networks in their conventions.

    convention      input                     time                prediction
    rectified flow  (1 - u) x0 + u ε          time_scale·u        ε - x0
    EDM             x0 + σ ε                  σ                   denoiser D(x; σ) = x̂0
    VP (DDPM)       √ᾱ x0 + √(1 - ᾱ) ε        timestep            ε, v or x0

`from_*` wraps a network of the convention as a TrigFlow network, which the losses, the samplers and
the trainer take; `to_*` is its inverse. The wrappers convert times in float64, pass them to the
network in float32 or better, and are differentiable, also by torch.func.jvp: a student can stay a
network of its own convention and train with losses in TrigFlow.

A flow map receives its second time, the end of a jump, as `end`; the same algebra holds for every
end, because a jump is linear in x and F:

    TrigFlow        x_s = cos(t - s) x - sin(t - s) F
    rectified flow  x_r = x_u - (u - r) U

with x_u = x/Z, Z = cos(t) + sin(t), F = ((cos(t) - sin(t)) x + U)/Z. F is the velocity of TrigFlow
for s = t, and U that of rectified flow, ε - x0, for r = u.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rcm.predictions import f_from_prediction, prediction_from_f
from rcm.time_conversions import t_from_u, u_from_t
from rcm.trigflow import Network, cos_sin, network_time


def _evaluate(
    net: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Any, end: Tensor | None
) -> Tensor:
    """Networks of one time need not have a parameter `end`."""
    time = network_time(t, x)
    if end is None:
        return net(x, time, condition)
    return net(x, time, condition, end=network_time(end, x))


def _path_scale(t: Tensor, x: Tensor) -> Tensor:
    """Z = cos(t) + sin(t), broadcast over x: the path of TrigFlow is Z that of rectified flow."""
    cos, sin = cos_sin(t, x)
    return cos + sin


# ---- rectified flow ----------------------------------------------------------------------------


def from_rectified_flow(net: Network, time_scale: float = 1.0) -> Network:
    """Wrap a rectified-flow network net(x_u, time_scale·u, condition) -> ε - x0 for TrigFlow.

    σd = 1. The conversion is exact for every t in [0, π/2] and never divides by sin(t).
    `time_scale` is 1000 for most published models. A flow map receives end = time_scale·r and
    returns the mean velocity U from u to r.
    """

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        u = u_from_t(t.double())
        x_u = (x / _path_scale(t.double(), x)).to(x.dtype)
        r = None if end is None else time_scale * u_from_t(end.double())
        prediction = _evaluate(net, x_u, time_scale * u, condition, r)
        return f_from_prediction(prediction, x_u, kind="flow", signal=1 - u, noise=u)

    return wrapped


def to_rectified_flow(net: Network, time_scale: float = 1.0) -> Network:
    """The inverse: a network U(x_u, time_scale·u, condition, end=time_scale·r) from a TrigFlow one.

    With x = Z x_u, U = Z F(x, t, condition, end) - (cos(t) - sin(t)) x. Without `end` U is ε - x0;
    with it, U is the mean velocity from u to r of MeanFlow (2505.13447).
    """

    def wrapped(x_u: Tensor, time: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        u = time.double() / time_scale
        t = t_from_u(u)
        x = (x_u * _path_scale(t, x_u)).to(x_u.dtype)
        s = None if end is None else t_from_u(end.double() / time_scale)
        f = _evaluate(net, x, t, condition, s)
        return prediction_from_f(f, x_u, kind="flow", signal=1 - u, noise=u)

    return wrapped
