"""Lagrangian flow map distillation: the end of a flow map moves along the teacher's ODE (AYF-LMD).

When s changes, the point f(x, t, s) = cos(d) x - sin(d) F(x, t, s), d = t - s, moves along the ODE
through x at t, with velocity V(f, s). With D = sin(d) dF/ds at fixed x and t, a student's error is

    e = df/ds - V(f, s) = sin(d) x + cos(d) F - D - V(f, s)

Two losses make e zero:

    stopped      ‖F - sg(F + ĝ)‖², g = -e, ĝ = g / (‖g‖ + c): AYF's, as in consistency.py
    un-stopped   ‖e‖², with gradients through f, D, and the input of the teacher

The Eulerian loss of consistency.py differentiates in x and t along the ODE instead. This one needs
dF/ds alone, but the teacher at the student's own points f.

Sources: AYF, 2506.14603: AYF-LMD. The un-stopped loss: flow map matching, 2406.07507.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm.derivatives import Derivative, exact_jvp, one_pass_jvp
from rcm.losses.consistency import move_along, normalize_tangent
from rcm.losses.loss import Loss, Norm, all_finite, sample_norm, squared_norm, zero_outside
from rcm.trigflow import (
    Network,
    check_end,
    check_like,
    check_times,
    cos_sin,
    denoised,
    interpolate,
    network_time,
)


@dataclass(frozen=True)
class LagrangianError:
    """F, D = sin(d) dF/ds, sin(d) x + cos(d) F - V(f, s), and e; (batch, ...) each."""

    f: Tensor
    jvp: Tensor
    velocity_error: Tensor
    e: Tensor


def lagrangian_error(
    student: Network,
    teacher: Network,
    x: Tensor,
    t: Tensor,
    end: Tensor,
    condition: Any,
    *,
    warmup: float = 1.0,
    derivative: Derivative = exact_jvp,
) -> LagrangianError:
    """e = sin(d) x + cos(d) F - r D - V(f, s), r = warmup; with gradients unless disabled.

    With one_pass_jvp only F has gradients. x: (batch, ...); t, end: (batch,). Raises ValueError for
    bad times or warmup.
    """
    check_times(t, x.shape[0])
    check_end(end, t)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup}; it must lie in [0, 1]")
    time, end_time = network_time(t, x), network_time(end, x)
    f, jvp = derivative(
        lambda end_time: student(x, time, condition, end=end_time),
        (end_time,),
        (torch.ones_like(end_time),),
        scale=torch.sin(t - end),
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and derivative is not one_pass_jvp):
        point = denoised(x, f, t - end)
        ode_velocity = teacher(point, end_time, condition)
        if point.requires_grad:
            # A teacher that returns NaN would multiply a masked gradient of zero by NaN.
            finite = all_finite(ode_velocity)
            point.register_hook(lambda gradient: zero_outside(finite, gradient))
        cos, sin = cos_sin(t - end, x)
        velocity_error = sin * x + cos * f - ode_velocity
        return LagrangianError(f, jvp, velocity_error, velocity_error - warmup * jvp)


def lagrangian_flow_map_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor,
    condition: Any,
    *,
    teacher: Network,
    stopped: bool = True,
    warmup: float = 1.0,
    tangent_norm: Norm = "rms",
    tangent_norm_eps: float = 0.1,
    derivative: Derivative = exact_jvp,
) -> Loss:
    """‖F - sg(F + ĝ)‖² with g = -e, or ‖e‖² if not stopped, per sample, at x of data and noise.

    Un-stopped needs a `derivative` of the student that carries gradients, and a differentiable
    teacher. Stopped evaluates the student once with one_pass_jvp. tangent_norm: "rms" averages over
    the elements of a sample, "l2" sums.

    x0, noise: (batch, ...) in units of σd; t: (batch,); end: s (batch,) in [0, t], passed to the
    student; teacher: a network of one time; warmup: r, a factor of D; tangent_norm_eps: c, of the
    stopped loss.

    Samples with non-finite data or e get value 0. They have no gradient either, except in the
    un-stopped loss and with one_pass_jvp if the student itself overflows. Diagnostics:
    "tangent_norm" ‖e‖, "jvp_norm" ‖D‖, "velocity_error" ‖sin(d) x + cos(d) F - V(f, s)‖, and
    "nonfinite", 1 for such a sample.
    Raises ValueError for bad shapes, times, warmup, norm or eps, and for one_pass_jvp if not
    stopped.
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    one_pass = derivative is one_pass_jvp
    if one_pass and not stopped:
        raise ValueError(
            "the un-stopped loss has gradients through the derivative, which one_pass_jvp "
            "detaches; use exact_jvp"
        )
    x = interpolate(x0, noise, t)
    finite = all_finite(x)
    x = zero_outside(finite, x)
    with torch.set_grad_enabled(torch.is_grad_enabled() and (one_pass or not stopped)):
        error = lagrangian_error(
            student, teacher, x, t, end, condition, warmup=warmup, derivative=derivative
        )
    finite = finite & all_finite(error.jvp, error.e)
    if stopped:
        g_hat = normalize_tangent(-error.e, norm=tangent_norm, eps=tangent_norm_eps)
        f, end_time = error.f, network_time(end, x)
        if not one_pass:
            f = student(zero_outside(finite, x), network_time(t, x), condition, end=end_time)
        value = move_along(f, g_hat, finite, tangent_norm)
    else:
        value = squared_norm(zero_outside(finite, error.e), tangent_norm)

    def norm(tensor: Tensor) -> Tensor:
        return zero_outside(finite, sample_norm(tensor.detach(), tangent_norm))

    return Loss(
        value,
        {
            "tangent_norm": norm(error.e),
            "jvp_norm": norm(error.jvp),
            "velocity_error": norm(error.velocity_error),
            "nonfinite": (~finite).to(x0.dtype),
        },
    )
