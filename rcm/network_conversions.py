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

from typing import Any

import torch
from torch import Tensor

from rcm.predictions import PREDICTIONS, Prediction, f_from_prediction, prediction_from_f
from rcm.time_conversions import VPSchedule, sigma_from_t, t_from_sigma, t_from_u, u_from_t
from rcm.trigflow import Network, cos_sin, evaluate
from rcm.validation import require_choice, require_positive

MIN_LEVEL = 1e-6  # of sin(t) and cos(t), where a prediction determines F only divided by them


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
    require_positive(time_scale=time_scale)

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        u = u_from_t(t.double())
        x_u = (x / _path_scale(t.double(), x)).to(x.dtype)
        r = None if end is None else time_scale * u_from_t(end.double())
        prediction = evaluate(net, x_u, time_scale * u, condition, r)
        return f_from_prediction(prediction, x_u, kind="flow", signal=1 - u, noise=u)

    return wrapped


def to_rectified_flow(net: Network, time_scale: float = 1.0) -> Network:
    """The inverse: a network U(x_u, time_scale·u, condition, end=time_scale·r) from a TrigFlow one.

    U = Z F(Z x_u, t, condition, end) - (cos(t) - sin(t)) Z x_u, with no division by sin(t).
    Without `end` U is ε - x0; with it, U is the mean velocity from u to r of MeanFlow (2505.13447).
    """
    require_positive(time_scale=time_scale)

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        u = t.double() / time_scale
        angle = t_from_u(u)
        on_path = (x * _path_scale(angle, x)).to(x.dtype)
        end_angle = None if end is None else t_from_u(end.double() / time_scale)
        f = evaluate(net, on_path, angle, condition, end_angle)
        return prediction_from_f(f, x, kind="flow", signal=1 - u, noise=u)

    return wrapped


# ---- EDM ---------------------------------------------------------------------------------------


def from_edm(net: Network, sigma_data: float = 0.5) -> Network:
    """Wrap a denoiser D(x0 + σ ε; σ) = x̂0 of EDM (2206.00364), with its preconditioning.

    D is in data units, like x0; σd is 0.5 for EDM's images. F = (cos(t) x - D/σd) / sin(t), so F
    has the error of D divided by sin(t). A flow map receives end = σ of the end, 0 at the data.
    The wrapper raises ValueError at t = 0, where D = x0 says nothing about ε, and at t = π/2, where
    σ is infinite: start sampling at atan(σ_max / σd).
    """
    require_positive(sigma_data=sigma_data)

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        t = t.double()
        _require_level("sin(t)", torch.sin(t), "D = x0 at t = 0 does not determine F")
        _require_level("cos(t)", torch.cos(t), "σ is infinite at t = π/2")
        sigma = sigma_from_t(t, sigma_data)
        cos, _ = cos_sin(t, x)
        noisy = (x * sigma_data / cos).to(x.dtype)
        sigma_end = None if end is None else sigma_from_t(end.double(), sigma_data)
        x0 = evaluate(net, noisy, sigma, condition, sigma_end)
        return f_from_prediction(
            x0, noisy, kind="x0", signal=torch.ones_like(t), noise=sigma, sigma_data=sigma_data
        )

    return wrapped


def to_edm(net: Network, sigma_data: float = 0.5) -> Network:
    """The inverse: a denoiser D(x0 + σ ε; σ) = σd (cos(t) x - sin(t) F), t = atan(σ/σd).

    Its input and D are in data units. Every finite σ ≥ 0 is allowed.
    """
    require_positive(sigma_data=sigma_data)

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        sigma = t.double()
        angle = t_from_sigma(sigma, sigma_data)
        cos, _ = cos_sin(angle, x)
        on_path = (x * cos / sigma_data).to(x.dtype)
        end_angle = None if end is None else t_from_sigma(end.double(), sigma_data)
        f = evaluate(net, on_path, angle, condition, end_angle)
        return prediction_from_f(
            f, x, kind="x0", signal=torch.ones_like(sigma), noise=sigma, sigma_data=sigma_data
        )

    return wrapped


# ---- VP (DDPM) ---------------------------------------------------------------------------------


def from_vp(
    net: Network,
    schedule: VPSchedule,
    prediction: Prediction = "eps",
    *,
    integer_timesteps: bool = False,
) -> Network:
    """Wrap a network net(x, timestep, condition) -> ε, v or x0 of DDPM for TrigFlow, with σd = 1.

    Real timesteps lie between those of the schedule. With integer_timesteps the network receives
    the nearest one as int64; its output is then piecewise constant in time, so such a network can
    be a teacher, but it has no time derivative.

    Raises ValueError if the prediction does not determine F at some time of the schedule: eps if
    the last ᾱ is 0 (zero terminal SNR, 2305.08891), x0 if the first is 1. The wrapper raises
    ValueError for times outside of the schedule, such as t = π/2 for most of them, and for an
    `end`, because the timesteps do not reach t = 0.
    """
    require_choice(PREDICTIONS, prediction=prediction)
    first, last = schedule.times[0], schedule.times[-1]
    if prediction == "x0":
        _require_level(
            "sin(t)", torch.sin(first), "x0 at the schedule's ᾱ = 1 does not determine F"
        )
    if prediction == "eps":
        _require_level("cos(t)", torch.cos(last), "ε at the schedule's ᾱ = 0 does not determine F")

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        _require_no_end(end)
        t = t.double()
        timestep = schedule.timestep(t)
        if integer_timesteps:
            predicted = net(x, timestep.round().long(), condition)
        else:
            predicted = evaluate(net, x, timestep, condition)
        signal, noise = torch.cos(t), torch.sin(t)
        return f_from_prediction(predicted, x, kind=prediction, signal=signal, noise=noise)

    return wrapped


def to_vp(net: Network, schedule: VPSchedule, prediction: Prediction = "eps") -> Network:
    """The inverse: a network of integer or real timesteps that predicts ε, v or x0."""
    require_choice(PREDICTIONS, prediction=prediction)

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        _require_no_end(end)
        angle = schedule.t(t)
        f = evaluate(net, x, angle, condition)
        signal, noise = torch.cos(angle), torch.sin(angle)
        return prediction_from_f(f, x, kind=prediction, signal=signal, noise=noise)

    return wrapped


def _require_level(name: str, level: Tensor, reason: str) -> None:
    if not bool((level >= MIN_LEVEL).all()):
        raise ValueError(
            f"{name} is {level.min().item():.2g}; it must be at least {MIN_LEVEL:g}: {reason}"
        )


def _require_no_end(end: Tensor | None) -> None:
    if end is not None:
        raise ValueError(
            "a VP network has one time, because its timesteps do not reach end = 0; use rectified "
            "flow or EDM for a flow map"
        )
