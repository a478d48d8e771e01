"""Continuous-time consistency: sCM distillation and training, and rCM's form of it.

A consistency function f(x, t) = cos(t) x - sin(t) F(x, t) is constant along an ODE dx/dt = V, so
its derivative along the ODE, written with D = cos(t) sin(t) dF/dt, must vanish:

    g = cos(t) df/dt = -cos²(t) (F - V) - (cos(t) sin(t) x + D)

Training moves F by a normalised g, with a stopped gradient: L = e^w ‖F - sg(F + ĝ)‖² - w. The
loss value is then ‖ĝ‖² whatever happens, so watch the diagnostics and samples instead.

V is a teacher's F (distillation) or cos(t) z - sin(t) x0 (training from data alone). Everything
is in units of σd (see trigflow.py): this g is sCM's divided by σd.

Sources: sCM = 2410.11081, rCM = 2510.08431 and its published code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.losses import Loss, all_finite, keep, per_sample
from rcm.trigflow import (
    Network,
    check_like,
    check_times,
    cos_sin,
    interpolate,
    network_time,
    velocity,
)

Form = Literal["scm", "rcm"]
TangentNorm = Literal["rms", "l2"]


@dataclass(frozen=True)
class Tangent:
    """F, D = cos(t) sin(t) dF/dt along the ODE, and the target g; (batch, ...) each, no graph."""

    f: Tensor
    derivative: Tensor
    g: Tensor


def _same_random_state(x: Tensor) -> AbstractContextManager[None]:
    """What runs inside leaves the random state as it was: dropout outside draws the same masks."""
    return torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])


@torch.no_grad()
def consistency_tangent(
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    *,
    warmup: float = 1.0,
    form: Form = "scm",
) -> Tangent:
    """The target g of the consistency loss, before normalisation.

    With r = warmup, in [0, 1], ramped up over the first iterations because D is what makes
    training unstable:

        "scm":  g = -cos²(t) (F - V)                       - r (cos(t) sin(t) x + D)
        "rcm":  g = -cos(t) sqrt(1 - r² sin²(t)) (F - V)   - (r cos(t) sin(t) x + D)

    rCM leaves D unscaled; at r = 1 both are cos(t) df/dt. The factor cos(t) sin(t) is part of the
    direction of the jvp (sCM, "JVP rearrangement"): dF/dt alone overflows as t nears π/2.

    x, ode_velocity: (batch, ...); t: (batch,). Raises ValueError for bad shapes, times, warmup or
    form.
    """
    check_times(t, x.shape[0])
    check_like("ode_velocity", ode_velocity, "x", x)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup}; it must lie in [0, 1]")
    cos, sin = cos_sin(t, x)
    time = network_time(t, x)
    x_direction = (cos * sin * ode_velocity).to(x.dtype)
    t_direction = (torch.cos(t) * torch.sin(t)).to(time.dtype)
    with _same_random_state(x):
        f, derivative = torch.func.jvp(  # type: ignore[misc]
            lambda x, time: student(x, time, condition), (x, time), (x_direction, t_direction)
        )
    f, derivative = f.to(cos.dtype), derivative.to(cos.dtype)
    if form == "scm":
        g = -(cos**2) * (f - ode_velocity) - warmup * (cos * sin * x + derivative)
    elif form == "rcm":
        root = torch.sqrt(1 - (warmup * sin) ** 2)
        g = -cos * root * (f - ode_velocity) - (warmup * cos * sin * x + derivative)
    else:
        raise ValueError(f"form {form!r} is unknown; allowed are 'scm' and 'rcm'")
    return Tangent(f, derivative, g)


def squared_size(tensor: Tensor, norm: TangentNorm) -> Tensor:
    """(batch, ...) -> (batch,): the mean ("rms") or the sum ("l2") of the squares."""
    if norm == "rms":
        return per_sample(tensor).square().mean(1)
    if norm == "l2":
        return per_sample(tensor).square().sum(1)
    raise ValueError(f"tangent norm {norm!r} is unknown; allowed are 'rms' and 'l2'")


def tangent_size(tensor: Tensor, norm: TangentNorm) -> Tensor:
    """(batch, ...) -> (batch,): the root mean square ("rms") or the Euclidean norm ("l2")."""
    return squared_size(tensor, norm).sqrt()


def normalized_tangent(g: Tensor, *, norm: TangentNorm, c: float) -> Tensor:
    """ĝ = g / (‖g‖ + c) per sample (sCM, "tangent normalization"); ValueError unless c > 0."""
    if c <= 0:
        raise ValueError(f"c is {c}; it must be positive, or a zero tangent becomes NaN")
    return g / (tangent_size(g, norm).view(-1, *[1] * (g.ndim - 1)) + c)


def consistency_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Any,
    *,
    teacher: Network | None = None,
    warmup: float = 1.0,
    form: Form = "scm",
    tangent_norm: TangentNorm = "rms",
    c: float = 0.1,
    log_weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """e^w ‖F - sg(F + ĝ)‖² - w per sample, the objective of sCM.

    tangent_norm names the convention of both norms: "rms" averages over the elements of a sample,
    as sCM does; "l2" sums, as rCM does, and is the one to add a summed score_loss to.

    x0, noise: (batch, ...) in units of σd; t: (batch,); teacher: None trains from data alone;
    log_weight: w(t), (batch,) -> (batch,), learned with the student (None is w = 0).
    Samples whose tangent is not finite get value 0 and no gradient, and are counted by the
    diagnostic "nonfinite". Raises ValueError for bad shapes, times, warmup, form, norm or c.
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x, time = interpolate(x0, noise, t), network_time(t, x0)
    with torch.no_grad():
        ode_velocity = velocity(x0, noise, t) if teacher is None else teacher(x, time, condition)
    tangent = consistency_tangent(student, x, t, ode_velocity, condition, warmup=warmup, form=form)
    finite = all_finite(x, tangent.f, tangent.g)
    target = tangent.f + normalized_tangent(tangent.g, norm=tangent_norm, c=c)

    # Bad samples enter the graded pass as zeros: a NaN activation would reach the gradient of the
    # weights as 0 · NaN, whatever the loss says.
    f = student(keep(finite, x), time, condition)
    value = squared_size(keep(finite, f - target), tangent_norm)
    if log_weight is not None:
        w = log_weight(time)
        value = keep(finite, torch.exp(w) * value - w)
    return Loss(
        value,
        {
            "g": keep(finite, tangent_size(tangent.g, tangent_norm)),
            "D": keep(finite, tangent_size(tangent.derivative, tangent_norm)),
            "F-V": keep(finite, tangent_size(tangent.f - ode_velocity, tangent_norm)),
            "nonfinite": (~finite).to(x0.dtype),
        },
    )


@torch.no_grad()
def derivative_cosine(
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    *,
    step: float = 1e-3,
) -> Tensor:
    """Cosine of D with a central difference of F along the ODE: (batch,), 1 when the jvp is right.

    A diagnostic to log now and then: low values mean a network that rounds its time, an attention
    kernel that drops its tangent, or a student so rough that `step` (in t) is too long.
    """
    exact = consistency_tangent(student, x, t, ode_velocity, condition).derivative

    def shifted(offset: float) -> Tensor:
        moved = torch.clamp(t.double() + offset, 0, torch.pi / 2).to(t.dtype)
        distance = (moved.double() - t.double()).view(-1, *[1] * (x.ndim - 1))
        with _same_random_state(x):
            y = (x + distance * ode_velocity).to(x.dtype)
            return student(y, network_time(moved, x), condition)

    difference = shifted(step) - shifted(-step)
    return torch.cosine_similarity(per_sample(exact), per_sample(difference), dim=1)
