"""MeanFlow, and improved MeanFlow (iMF): learn the mean velocity between two times.

In rectified flow the mean velocity U of the ODE dx/du = v between r and u satisfies

    x_r = x_u - (u - r) U                   the flow map from u to r
    U = v - (u - r) dU/du                   dU/du along (dx, du, dr) = (v, 1, 0)

MeanFlow (2505.13447, §4.1) regresses U to the right-hand side, with a stopped gradient.
v = ε - x0 of data and noise serves as target and as direction of the derivative; its mean given x
is the velocity. iMF (2512.02012) differentiates along the network's own velocity instead, which
has less variance, and regresses V = U + (u - r) sg(dU/du) to v. Both are the loss

    ‖U + (u - r) sg(dU/du) - v‖² / sg(‖·‖² + eps)^power

A student is a TrigFlow network F. With C = cos t, S = sin t, Z = C + S, and Z_s at s = end,

    U = Z F - (C - S) x                     for every end: also v = Z V - (C - S) x for velocities V
    (u - r) dU/du = sin(t - s) Z/Z_s dU/dt  along TrigFlow's (V, 1, 0), since du/dt = 1/Z²

Everything is in units of σd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm.derivatives import Derivative, exact_jvp, one_pass_jvp
from rcm.guidance import TIME_ROUNDING, GuidedCondition
from rcm.losses.loss import Loss, Norm, all_finite, sample_norm, squared_norm, zero_outside
from rcm.trigflow import (
    Network,
    check_end,
    check_like,
    check_times,
    cos_sin,
    interpolate,
    network_time,
    velocity,
)
from rcm.validation import require_number, require_positive


def mean_velocity(f: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Rectified flow's U = Z F - (C - S) x: f, x (batch, ...), t (batch,) -> (batch, ...).

    F of a flow map gives its mean velocity, F of a velocity the velocity. network_conversions.py
    converts whole networks.
    """
    cos, sin = cos_sin(t, x)
    return (cos + sin) * f - (cos - sin) * x


def mean_flow_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor,
    condition: Any,
    *,
    teacher: Network | None = None,
    improved: bool = False,
    guidance: tuple[Tensor, Tensor, Tensor] | None = None,
    null_condition: Callable[[Any], Any] | None = None,
    warmup: float = 1.0,
    norm: Norm = "l2",
    power: float = 1.0,
    eps: float = 1e-3,
    derivative: Derivative = exact_jvp,
) -> Loss:
    """‖U - sg(U_target)‖² / sg(‖U - U_target‖² + eps)^power per sample.

    x0, noise: (batch, ...) in units of σd; t, end: (batch,), 0 <= end <= t. At end = t this is flow
    matching. teacher: its velocity is v (distillation); None takes that of data and noise.

    norm, power, eps: "l2" sums the squares over the elements as the papers do, with power 1; eps is
    1e-3 in MeanFlow and 0.01 in iMF. "rms" averages them. warmup in [0, 1] scales dU/du; the papers
    have none.

    improved: iMF. The network's own velocity is the auxiliary head's if it has one, otherwise
    F(x, t, t). An auxiliary head is a method student.heads(x, t, condition, end) -> (F, velocity),
    both TrigFlow's; then a second term of the same form trains the head on v.

    guidance, of iMF: (scale, low, high), (batch,) each, makes classifier-free guidance an input
    of the student. Its condition becomes GuidedCondition(condition, scale, low, high); v becomes

        v_g = v + (1 - 1/w) (v_c - v_u)         w = scale if t is in [low, high], otherwise 1

    where v_c, v_u are its own velocities under `condition` at scale w and under
    null_condition(condition) at scale 1, without an interval. At a fixed point its own velocity is
    v_u + w (E[v|x] - v_u). Samples whose condition is already the null condition need scale 1.

    derivative: how dU/du is computed; with one_pass_jvp the same evaluation of the student gives U
    its gradient.

    Samples with a non-finite x, U, target or auxiliary head get value 0 and no gradient, except
    that with one_pass_jvp a student that overflows has a non-finite gradient. Diagnostics:
    "mean_flow" ‖U - U_target‖², "auxiliary" the same of the head if there is one, "jvp_norm"
    ‖(u - r) dU/du‖, "velocity_error" ‖U - v‖, and "nonfinite", 1 for such a sample.

    Raises ValueError for bad shapes, times, warmup, norm, power or eps, and for guidance without
    null_condition or improved=True.
    """
    check_times(t, x0.shape[0])
    check_end(end, t)
    check_like("noise", noise, "x0", x0)
    require_number("[]", 0, 1, warmup=warmup)
    require_number("[)", 0, float("inf"), power=power)
    require_positive(eps=eps)
    x, time, end_time = interpolate(x0, noise, t), network_time(t, x0), network_time(end, x0)
    with torch.no_grad():
        v = velocity(x0, noise, t) if teacher is None else teacher(x, time, condition)
        direction = v
        if guidance is not None:
            if not improved or null_condition is None:
                raise ValueError("guidance needs improved=True and a null_condition")
            null = null_condition(condition)
            direction, v = _guided(student, x, time, v, condition, null, guidance)
            condition = GuidedCondition(condition, *guidance)
        elif improved:
            direction = _own_velocity(student, x, time, condition)
        v = mean_velocity(v, x, t)
    # Non-finite samples enter a pass with gradients as zeros; see consistency_loss.
    finite = all_finite(x, direction, v)
    x, direction = zero_outside(finite, x), zero_outside(finite, direction)
    heads = _heads(student) if improved else None

    def mean_velocities(x: Tensor, time: Tensor) -> Tensor:
        """U and, if there is an auxiliary head, its velocity: (batch, 1 or 2, ...)."""
        outputs: tuple[Tensor, ...]
        if heads is None:
            outputs = (student(x, time, condition, end=end_time),)
        else:
            outputs = heads(x, time, condition, end_time)
        return torch.stack([mean_velocity(f, x, time) for f in outputs], dim=1)

    one_pass = derivative is one_pass_jvp
    with torch.set_grad_enabled(torch.is_grad_enabled() and one_pass):
        velocities, changes = derivative(
            mean_velocities, (x, time), (direction, torch.ones_like(time)), _time_factor(t, end)
        )
    u, change = velocities[:, 0].detach(), changes[:, 0]
    target = v - warmup * change
    finite = finite & all_finite(velocities, target)
    if not one_pass:
        velocities = mean_velocities(zero_outside(finite, x), time)

    def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
        return squared_norm(zero_outside(finite, velocity - target), norm)

    def weighted(squared: Tensor) -> Tensor:
        return squared / (squared.detach() + eps) ** power

    squared = squared_error(velocities[:, 0], target)
    value = weighted(squared)
    diagnostics = {
        "mean_flow": squared.detach(),
        "jvp_norm": zero_outside(finite, sample_norm(change, norm)),
        "velocity_error": zero_outside(finite, sample_norm(u - v, norm)),
        "nonfinite": (~finite).to(x0.dtype),
    }
    if heads is not None:
        auxiliary = squared_error(velocities[:, 1], v)
        value = value + weighted(auxiliary)
        diagnostics["auxiliary"] = auxiliary.detach()
    return Loss(value, diagnostics)


# ---- guidance and the network's own velocity ---------------------------------------------------


def _guided(
    student: Network,
    x: Tensor,
    time: Tensor,
    v: Tensor,
    condition: Any,
    null: Any,
    guidance: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """(v_c, v + (1 - 1/w) (v_c - v_u)), velocities of TrigFlow (batch, ...) each."""
    scale, low, high = guidance
    check_scale("scale of guidance", scale, time)
    check_like("low of guidance", low, "t", time)
    check_like("high of guidance", high, "t", time)
    inside = (time >= low - TIME_ROUNDING) & (time <= high + TIME_ROUNDING)
    w = torch.where(inside, scale, torch.ones_like(scale))
    v_c = _own_velocity(student, x, time, guided_at_all_times(condition, w))
    v_u = _own_velocity(student, x, time, guided_at_all_times(null, torch.ones_like(w)))
    strength = (1 - 1 / w).to(v_c.dtype).view(-1, *[1] * (x.ndim - 1))
    return v_c, v + strength * (v_c - v_u)


def guided_at_all_times(condition: Any, scale: Tensor) -> GuidedCondition:
    """Guidance of scale (batch,) in the interval [0, π/2]."""
    return GuidedCondition(
        condition, scale, torch.zeros_like(scale), torch.full_like(scale, torch.pi / 2)
    )


def check_scale(name: str, scale: Tensor, t: Tensor) -> None:
    """Raise ValueError unless scale is shaped like t and positive."""
    check_like(name, scale, "t", t)
    if not bool((scale > 0).all()):
        raise ValueError(f"{name} is as low as {scale.min().item():.6g}; it must be positive")


def _heads(student: Network) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The method that computes F and the velocity of an auxiliary head, if the student has one."""
    return getattr(student, "heads", None)


def _own_velocity(student: Network, x: Tensor, time: Tensor, condition: Any) -> Tensor:
    """TrigFlow's velocity of a flow map: the auxiliary head if there is one, or F(x, t, t)."""
    heads = _heads(student)
    if heads is None:
        return student(x, time, condition, end=time)
    return heads(x, time, condition, time)[1]


def _time_factor(t: Tensor, end: Tensor) -> Tensor:
    """sin(t - s) Z/Z_s = (u - r) dt/du, (batch,): zero at end = t, without cancellation."""
    z, z_end = torch.cos(t) + torch.sin(t), torch.cos(end) + torch.sin(end)
    return torch.sin(t - end) * z / z_end
