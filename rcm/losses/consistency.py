"""Continuous-time consistency: sCM distillation and training, rCM's variant, and flow maps.

A flow map f(x, t, s) = cos(d) x - sin(d) F(x, t, s), d = t - s, takes x at t to the point at s of
the ODE dx/dt = V through it. All points of the ODE have the same f, so its derivative along the ODE
must be zero. With D = cos(d) sin(d) dF/dt,

    g = cos(d) df/dt = -cos²(d) (F - V) - (cos(d) sin(d) x + D)

With s = 0, f is sCM's consistency function. With s = t, g = V - F is the gradient of flow matching.
With any s in [0, t] this is AYF-EMD. Training moves F along the normalised tangent
ĝ = g / (‖g‖ + c), with a stopped gradient:

    L = e^w ‖F - sg(F + ĝ)‖² - w

The value of ‖F - sg(F + ĝ)‖² is always ‖ĝ‖², which is close to 1 for any g much larger than c.
Watch the diagnostics and the samples instead of the loss.

V is a teacher's F (distillation) or cos(t) z - sin(t) x0 (training from data alone). Everything is
in units of σd (see trigflow.py), so this g is sCM's g divided by σd.

Sources: sCM, 2410.11081: df/dt in §3, the normalised tangent, its warm-up and the learned weight w
in §4.2, the factor cos(t) of g in algorithm 1. rCM, 2510.08431, and its published code. AYF,
2506.14603: AYF-EMD.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.derivatives import Derivative, central_difference, exact_jvp, one_pass_jvp
from rcm.losses.loss import (
    Loss,
    Norm,
    all_finite,
    per_sample,
    sample_norm,
    squared_norm,
    zero_outside,
)
from rcm.trigflow import (
    Network,
    check_end,
    check_like,
    check_times,
    cos_sin,
    evaluate,
    interpolate,
    network_time,
    velocity,
)

Form = Literal["scm", "rcm"]


@dataclass(frozen=True)
class Tangent:
    """F, its derivative D = cos(d) sin(d) dF/dt along the ODE, and g; (batch, ...), detached.

    Inside of a loss with one_pass_jvp, F carries gradients.
    """

    f: Tensor
    jvp: Tensor
    g: Tensor


def _derivative_along_ode(
    derivative: Derivative,
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    end: Tensor | None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """F, and scale · dF/dt in the direction (V, 1), at a fixed end."""
    time = network_time(t, x)
    return derivative(
        lambda x, time: evaluate(student, x, time, condition, end),
        (x, time),
        (ode_velocity, torch.ones_like(time)),
        scale,
    )


def consistency_tangent(
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    *,
    end: Tensor | None = None,
    warmup: float = 1.0,
    form: Form = "scm",
    derivative: Derivative = exact_jvp,
) -> Tangent:
    """The tangent g of the consistency loss, before normalisation.

    r = warmup in [0, 1] is ramped up over the first iterations, because D makes training unstable:

        "scm":  g = -cos²(d) (F - V)                       - r (cos(d) sin(d) x + D)
        "rcm":  g = -cos(d) sqrt(1 - r² sin²(d)) (F - V)   - (r cos(d) sin(d) x + D)

    rCM does not scale D by r; at r = 1 both forms equal cos(d) df/dt. cos(d) sin(d) is the scale of
    the derivative (see exact_jvp), because dF/dt alone overflows as t approaches π/2.

    x, ode_velocity: (batch, ...); t: (batch,); end: s (batch,), None is s = 0 and a network of one
    time. Raises ValueError for bad shapes, times, warmup or form.
    """
    with torch.no_grad():
        return _tangent(student, x, t, ode_velocity, condition, end, warmup, form, derivative)


def _tangent(
    student: Network,
    x: Tensor,
    t: Tensor,
    ode_velocity: Tensor,
    condition: Any,
    end: Tensor | None,
    warmup: float,
    form: Form,
    derivative: Derivative,
) -> Tangent:
    """consistency_tangent, whose F carries gradients unless they are disabled."""
    check_times(t, x.shape[0])
    check_like("ode_velocity", ode_velocity, "x", x)
    if end is not None:
        check_end(end, t)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup}; it must lie in [0, 1]")
    gap = t if end is None else t - end
    f, jvp = _derivative_along_ode(
        derivative,
        student,
        x,
        t,
        ode_velocity,
        condition,
        end,
        scale=torch.cos(gap) * torch.sin(gap),
    )
    cos, sin = cos_sin(gap, x)
    f, jvp = f.to(cos.dtype), jvp.to(cos.dtype)
    with torch.no_grad():
        error = f - ode_velocity
        if form == "scm":
            g = -(cos**2) * error - warmup * (cos * sin * x + jvp)
        elif form == "rcm":
            root = torch.sqrt(1 - (warmup * sin) ** 2)
            g = -cos * root * error - (warmup * cos * sin * x + jvp)
        else:
            raise ValueError(f"form {form!r} is unknown; allowed are 'scm' and 'rcm'")
    return Tangent(f, jvp, g)


def normalize_tangent(g: Tensor, *, norm: Norm, eps: float) -> Tensor:
    """ĝ = g / (‖g‖ + eps) per sample (sCM §4.2, "tangent normalization", c = eps).

    Raises ValueError unless eps is positive.
    """
    if eps <= 0:
        raise ValueError(
            f"tangent_norm_eps is {eps}; it must be positive, otherwise a zero tangent becomes NaN"
        )
    return g / (sample_norm(g, norm).view(-1, *[1] * (g.ndim - 1)) + eps)


def move_along(f: Tensor, g_hat: Tensor, finite: Tensor, norm: Norm) -> Tensor:
    """‖F - sg(F + ĝ)‖² per sample, 0 outside of finite: F with gradients, ĝ (batch, ...)."""
    # F - sg(F) is exactly zero and carries the gradient. F + ĝ would round ĝ to the spacing of F.
    return squared_norm(zero_outside(finite, f - f.detach() - g_hat), norm)


def consistency_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Any,
    *,
    end: Tensor | None = None,
    teacher: Network | None = None,
    warmup: float = 1.0,
    form: Form = "scm",
    tangent_norm: Norm = "rms",
    tangent_norm_eps: float = 0.1,
    log_weight: Callable[[Tensor], Tensor] | None = None,
    derivative: Derivative = exact_jvp,
) -> Loss:
    """e^w ‖F - sg(F + ĝ)‖² - w per sample, the objective of sCM and, with `end`, of AYF-EMD.

    tangent_norm chooses both norms: "rms" averages over the elements of a sample, as sCM does; "l2"
    sums, as rCM does. Use "l2" when adding a score_loss, which is a sum too.

    x0, noise: (batch, ...) in units of σd; t: (batch,); end: s (batch,) in [0, t], passed to the
    student (None is s = 0 and a student of one time); teacher: a network of one time, None trains
    from data alone; tangent_norm_eps: sCM's c; log_weight: w(t), (batch,) -> (batch,), learned with
    the student (None is w = 0); derivative: how dF/dt is computed; with one_pass_jvp the student is
    evaluated once.

    Samples with a non-finite tangent get value 0 and no gradient, except that with one_pass_jvp a
    student that overflows has a non-finite gradient. Diagnostics: "tangent_norm" ‖g‖,
    "jvp_norm" ‖D‖, "velocity_error" ‖F - V‖, and "nonfinite", 1 for such a sample. Raises
    ValueError for bad shapes, times, warmup, form, norm or eps.
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x, time = interpolate(x0, noise, t), network_time(t, x0)
    with torch.no_grad():
        ode_velocity = velocity(x0, noise, t) if teacher is None else teacher(x, time, condition)
    # Non-finite samples enter a pass with gradients as zeros: a NaN activation would reach the
    # gradient of the weights as 0 · NaN even with a masked loss.
    finite = all_finite(x, ode_velocity)
    x, ode_velocity = zero_outside(finite, x), zero_outside(finite, ode_velocity)
    one_pass = derivative is one_pass_jvp
    with torch.set_grad_enabled(torch.is_grad_enabled() and one_pass):
        tangent = _tangent(student, x, t, ode_velocity, condition, end, warmup, form, derivative)
    finite = finite & all_finite(tangent.f, tangent.g)
    g_hat = normalize_tangent(tangent.g, norm=tangent_norm, eps=tangent_norm_eps)
    f = tangent.f
    if not one_pass:
        f = evaluate(student, zero_outside(finite, x), time, condition, end)
    value = move_along(f, g_hat, finite, tangent_norm)
    if log_weight is not None:
        w = log_weight(time)
        value = zero_outside(finite, torch.exp(w) * value - w)
    return Loss(
        value,
        {
            "tangent_norm": zero_outside(finite, sample_norm(tangent.g, tangent_norm)),
            "jvp_norm": zero_outside(finite, sample_norm(tangent.jvp, tangent_norm)),
            "velocity_error": zero_outside(
                finite, sample_norm(tangent.f.detach() - ode_velocity, tangent_norm)
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
    end: Tensor | None = None,
    step: float = 1e-3,
) -> Tensor:
    """Cosine of the exact dF/dt with a central difference of F along the ODE: (batch,), ideally 1.

    It checks the JVP. A low value means that the network rounds its time, that an attention kernel
    drops its tangent, or that `step` (in t) is too long for a rough student.
    """
    exact, difference = (
        _derivative_along_ode(derivative, student, x, t, ode_velocity, condition, end)[1]
        for derivative in (exact_jvp, central_difference(step))
    )
    return torch.cosine_similarity(per_sample(exact), per_sample(difference), dim=1)
