"""Terminal velocity matching (TVM, 2511.19797): a flow map from the velocity at its end.

A flow map f(x, u, r) of rectified flow from u to r arrives with the velocity of the ODE at r,

    df/dr = v(f, r)                         f = x_u + (r - u) U

and U(x, r, r) is the velocity. TVM trains both with one network, without a teacher:

    ‖df/dr - sg(U'(f, r, r))‖² + ‖U(x_r, r, r) - v‖²        v = ε - x0 at x_r = (1 - r) x0 + r ε

U' is the target, the student itself or an average of its weights. The gradient flows through both
U and dU/dr: derivatives of the derivative that attention kernels must have.

A student is a TrigFlow network F. With C = cos t, S = sin t, Z = C + S, and Z_s at s = end,

    U = Z F - (C - S) x                     df/dr = U - sin(t - s) Z_s dF/ds, since dr/ds = 1/Z_s²

Everything is in units of σd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm.derivatives import Derivative, exact_jvp, one_pass_jvp
from rcm.guidance import GuidedCondition
from rcm.losses.loss import Loss, all_finite, squared_norm, zero_outside
from rcm.losses.mean_flow import check_scale, guided_at_all_times, mean_velocity
from rcm.trigflow import (
    Network,
    check_end,
    check_like,
    check_times,
    cos_sin,
    denoised,
    evaluate,
    interpolate,
    network_time,
    velocity,
)
from rcm.validation import require_number


def terminal_velocity_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor,
    condition: Any,
    *,
    target: Network | None = None,
    flow_matching_times: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    null_condition: Callable[[Any], Any] | None = None,
    terminal_weight: float = 1.0,
    flow_matching_weight: float = 1.0,
    derivative: Derivative = exact_jvp,
) -> Loss:
    """‖df/dr - sg(U'(f, r, r))‖² + ‖U(x_s, s, s) - v‖², means over the elements, per sample.

    x0, noise: (batch, ...) in units of σd; t, end: (batch,), 0 <= end <= t. The first term is 0 at
    end = t. target: the network U', without gradients; None is the student.

    flow_matching_times: (batch,), times of the second term; None is `end`. The paper's code draws
    them from a distribution of their own.

    guidance_scale: w > 0 (batch,) makes classifier-free guidance an input of the student. Its
    condition becomes GuidedCondition(condition, w, 0, π/2), both terms are divided by w², and v
    becomes

        v_g = w v + (1 - w) U'(x_s, s, s) under null_condition(condition) at scale 1

    Samples whose condition is already the null condition need scale 1. With
    `scaled_by_guidance(net)` for student and target, this is the scaled parameterisation of the
    paper.

    Samples with non-finite data, target or error get value 0. They have no gradient either, except
    if the student itself overflows. Diagnostics: "terminal" and "flow_matching" the two terms
    without their weights, "jvp_norm" the root mean square of (r - u) dU/dr, and "nonfinite", 1 for
    such a sample. Raises ValueError for bad shapes, times or weights, for a guidance_scale without
    null_condition, and for one_pass_jvp, whose derivative has no gradient.
    """
    if derivative is one_pass_jvp:
        raise ValueError(
            "terminal velocity matching has gradients through the derivative, which one_pass_jvp "
            "detaches; use exact_jvp"
        )
    check_times(t, x0.shape[0])
    check_end(end, t)
    check_like("noise", noise, "x0", x0)
    s = end if flow_matching_times is None else flow_matching_times
    check_times(s, x0.shape[0])
    require_number(
        "[)",
        0,
        float("inf"),
        terminal_weight=terminal_weight,
        flow_matching_weight=flow_matching_weight,
    )
    target = student if target is None else target
    null: Any = None
    if guidance_scale is not None:
        check_scale("guidance_scale", guidance_scale, t)
        if null_condition is None:
            raise ValueError("guidance_scale needs a null_condition")
        null = guided_at_all_times(null_condition(condition), torch.ones_like(guidance_scale))
        condition = guided_at_all_times(condition, guidance_scale)

    # A NaN activation would reach the gradient of the weights as 0 · NaN even with a masked loss.
    finite = all_finite(x0, noise)
    x0, noise = zero_outside(finite, x0), zero_outside(finite, noise)
    x, time, end_time = interpolate(x0, noise, t), network_time(t, x0), network_time(end, x0)
    x_s, s_time = interpolate(x0, noise, s), network_time(s, x0)

    f, change = derivative(
        lambda end_time: student(x, time, condition, end=end_time),
        (end_time,),
        (torch.ones_like(end_time),),
        -torch.sin(t - end) * (torch.cos(end) + torch.sin(end)),
    )
    terminal_velocity = mean_velocity(f, x, t) + change
    own_velocity = mean_velocity(student(x_s, s_time, condition, end=s_time), x_s, s)
    with torch.no_grad():
        x_end = denoised(x, f, t - end)
        goal = mean_velocity(target(x_end, end_time, condition, end=end_time), x_end, end)
        v = mean_velocity(velocity(x0, noise, s), x_s, s)
        if guidance_scale is not None:
            unguided = mean_velocity(target(x_s, s_time, null, end=s_time), x_s, s)
            w = guidance_scale.to(v.dtype).view(-1, *[1] * (x.ndim - 1))
            v = w * v + (1 - w) * unguided
        finite = finite & all_finite(terminal_velocity, own_velocity, goal, v)

    def squared_error(velocity: Tensor, goal: Tensor, among: Tensor) -> Tensor:
        squared = squared_norm(zero_outside(among, velocity - goal), "rms")
        if guidance_scale is not None:
            squared = squared / guidance_scale.to(squared.dtype) ** 2
        return squared

    terminal = squared_error(terminal_velocity, goal, finite & (end_time < time))
    flow_matching = squared_error(own_velocity, v, finite)
    return Loss(
        terminal_weight * terminal + flow_matching_weight * flow_matching,
        {
            "terminal": terminal.detach(),
            "flow_matching": flow_matching.detach(),
            "jvp_norm": squared_norm(zero_outside(finite, change.detach()), "rms").sqrt(),
            "nonfinite": (~finite).to(x0.dtype),
        },
    )


def scaled_by_guidance(net: Network) -> Network:
    """The network of a flow map whose mean velocity U is w times that of `net`.

    Its condition is a GuidedCondition of scale w. It is TVM's scaled parameterisation: the output
    of `net` then varies less with w. Train and sample with the wrapped network.
    """

    def wrapped(
        x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor | None = None
    ) -> Tensor:
        # U = Z F - (C - S) x, so w U belongs to w F + (1 - w) (C - S)/Z x.
        f = evaluate(net, x, t, condition, end)
        cos, sin = cos_sin(t, x)
        w = condition.scale.to(cos.dtype).view(cos.shape)
        return w * f + (1 - w) * (cos - sin) / (cos + sin) * x

    return wrapped
