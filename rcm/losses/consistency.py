"""Continuous-time consistency: sCM distillation and training, and rCM's variant.

A consistency function f(x, t) = cos(t) x - sin(t) F(x, t) is constant along an ODE dx/dt = V. Its
derivative along the ODE must therefore be zero. With D = cos(t) sin(t) dF/dt,

    g = cos(t) df/dt = -cos²(t) (F - V) - (cos(t) sin(t) x + D)

Training moves F along the normalised tangent ĝ = g / (‖g‖ + c), with a stopped gradient:

    L = e^w ‖F - sg(F + ĝ)‖² - w

The value of ‖F - sg(F + ĝ)‖² is always ‖ĝ‖², which is close to 1 for any g much larger than c.
Watch the diagnostics and the samples instead of the loss.

V is a teacher's F (distillation) or cos(t) z - sin(t) x0 (training from data alone). Everything is
in units of σd (see trigflow.py), so this g is sCM's g divided by σd.

Sources: sCM, 2410.11081: df/dt in §3, the normalised tangent, its warm-up and the learned weight w
in §4.2, the factor cos(t) of g in algorithm 1. rCM, 2510.08431, and its published code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.losses.loss import Loss, all_finite, per_sample, zero_outside
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
    """F, its JVP D = cos(t) sin(t) dF/dt along the ODE, and g; (batch, ...) each, detached."""

    f: Tensor
    jvp: Tensor
    g: Tensor


def _preserve_rng_state(x: Tensor) -> AbstractContextManager[None]:
    """Restore the random state on exit, so that the next forward draws the same dropout masks."""
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
    """The tangent g of the consistency loss, before normalisation.

    r = warmup in [0, 1] is ramped up over the first iterations, because D makes training unstable:

        "scm":  g = -cos²(t) (F - V)                       - r (cos(t) sin(t) x + D)
        "rcm":  g = -cos(t) sqrt(1 - r² sin²(t)) (F - V)   - (r cos(t) sin(t) x + D)

    rCM does not scale D by r; at r = 1 both forms equal cos(t) df/dt. The factor cos(t) sin(t) is
    part of the direction of the JVP (sCM §4.2, "JVP rearrangement"), because dF/dt alone overflows
    as t approaches π/2.

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
    with _preserve_rng_state(x):
        f, jvp = torch.func.jvp(  # type: ignore[misc]
            lambda x, time: student(x, time, condition), (x, time), (x_direction, t_direction)
        )
    f, jvp = f.to(cos.dtype), jvp.to(cos.dtype)
    if form == "scm":
        g = -(cos**2) * (f - ode_velocity) - warmup * (cos * sin * x + jvp)
    elif form == "rcm":
        root = torch.sqrt(1 - (warmup * sin) ** 2)
        g = -cos * root * (f - ode_velocity) - (warmup * cos * sin * x + jvp)
    else:
        raise ValueError(f"form {form!r} is unknown; allowed are 'scm' and 'rcm'")
    return Tangent(f, jvp, g)


def squared_norm(tensor: Tensor, norm: TangentNorm) -> Tensor:
    """Mean ("rms") or sum ("l2") of the squares of each sample: (batch, ...) -> (batch,)."""
    if norm == "rms":
        return per_sample(tensor).square().mean(1)
    if norm == "l2":
        return per_sample(tensor).square().sum(1)
    raise ValueError(f"tangent norm {norm!r} is unknown; allowed are 'rms' and 'l2'")


def sample_norm(tensor: Tensor, norm: TangentNorm) -> Tensor:
    """Root mean square ("rms") or Euclidean norm ("l2") per sample: (batch, ...) -> (batch,)."""
    return squared_norm(tensor, norm).sqrt()


def normalize_tangent(g: Tensor, *, norm: TangentNorm, eps: float) -> Tensor:
    """ĝ = g / (‖g‖ + eps) per sample (sCM §4.2, "tangent normalization", c = eps).

    Raises ValueError unless eps is positive.
    """
    if eps <= 0:
        raise ValueError(
            f"tangent_norm_eps is {eps}; it must be positive, otherwise a zero tangent becomes NaN"
        )
    return g / (sample_norm(g, norm).view(-1, *[1] * (g.ndim - 1)) + eps)


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
    tangent_norm_eps: float = 0.1,
    log_weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """e^w ‖F - sg(F + ĝ)‖² - w per sample, the objective of sCM.

    tangent_norm chooses both norms: "rms" averages over the elements of a sample, as sCM does; "l2"
    sums, as rCM does. Use "l2" when adding a score_loss, which is a sum too.

    x0, noise: (batch, ...) in units of σd; t: (batch,); teacher: None trains from data alone;
    tangent_norm_eps: sCM's c; log_weight: w(t), (batch,) -> (batch,), learned with the student
    (None is w = 0).

    Samples with a non-finite tangent get value 0 and no gradient. Diagnostics: "tangent_norm" ‖g‖,
    "jvp_norm" ‖D‖, "velocity_error" ‖F - V‖, and "nonfinite", 1 for such a sample. Raises
    ValueError for bad shapes, times, warmup, form, norm or eps.
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x, time = interpolate(x0, noise, t), network_time(t, x0)
    with torch.no_grad():
        ode_velocity = velocity(x0, noise, t) if teacher is None else teacher(x, time, condition)
    tangent = consistency_tangent(student, x, t, ode_velocity, condition, warmup=warmup, form=form)
    finite = all_finite(x, tangent.f, tangent.g)
    target = tangent.f + normalize_tangent(tangent.g, norm=tangent_norm, eps=tangent_norm_eps)

    # Non-finite samples enter the pass with gradients as zeros: a NaN activation would reach the
    # gradient of the weights as 0 · NaN even with a masked loss.
    f = student(zero_outside(finite, x), time, condition)
    value = squared_norm(zero_outside(finite, f - target), tangent_norm)
    if log_weight is not None:
        w = log_weight(time)
        value = zero_outside(finite, torch.exp(w) * value - w)
    return Loss(
        value,
        {
            "tangent_norm": zero_outside(finite, sample_norm(tangent.g, tangent_norm)),
            "jvp_norm": zero_outside(finite, sample_norm(tangent.jvp, tangent_norm)),
            "velocity_error": zero_outside(
                finite, sample_norm(tangent.f - ode_velocity, tangent_norm)
            ),
            "nonfinite": (~finite).to(x0.dtype),
        },
    )


@torch.no_grad()
def jvp_cosine(
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    *,
    step: float = 1e-3,
) -> Tensor:
    """Cosine of the JVP D with a central difference of F along the ODE: (batch,), ideally 1.

    It checks the JVP. A low value means that the network rounds its time, that an attention kernel
    drops its tangent, or that `step` (in t) is too long for a rough student.
    """
    exact = consistency_tangent(student, x, t, ode_velocity, condition).jvp

    def shifted(offset: float) -> Tensor:
        moved = torch.clamp(t.double() + offset, 0, torch.pi / 2).to(t.dtype)
        distance = (moved.double() - t.double()).view(-1, *[1] * (x.ndim - 1))
        with _preserve_rng_state(x):
            y = (x + distance * ode_velocity).to(x.dtype)
            return student(y, network_time(moved, x), condition)

    difference = shifted(step) - shifted(-step)
    return torch.cosine_similarity(per_sample(exact), per_sample(difference), dim=1)
