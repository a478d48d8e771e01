"""Discrete consistency models (dCM): neighbouring points of an ODE trajectory have the same x̂0.

A consistency function is constant along the teacher's ODE. The continuous-time loss sets its
derivative to zero; this one compares two points. From x at t₀, k steps of the teacher lead to x' at
t_k, nearer to the data:

    L = ‖x̂0(x, t₀) - sg x̂0(x', t_k)‖²

No JVP is needed, but the student inherits the errors of the ODE steps. Causal-rCM (2606.25473) uses
it as a warm-up for the continuous-time loss. Sources: consistency distillation, 2303.01469 §4; the
times are those of rCM's published code.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from rcm.derivatives import restored_random_state
from rcm.losses.loss import Loss, Norm, all_finite, squared_norm, zero_outside
from rcm.ode import Solver, ode_step
from rcm.time_conversions import t_from_u
from rcm.time_sampling import shift_u
from rcm.trigflow import Network, check_like, check_times, denoise, interpolate
from rcm.validation import require_integer, require_positive


def discrete_times(
    count: int, generator: Generator, *, steps: int = 48, skip: int = 1, shift: float = 5.0
) -> Tensor:
    """Times of `skip` neighbouring steps of a sampler with `steps` steps: (skip + 1, count).

    Rectified flow's u is divided into `steps` equal parts whose offset is random, and then shifted
    towards noise (shift_u). The first time is therefore continuous in (0, π/2]. float64, decreasing
    along the first dimension. Raises ValueError unless 1 <= skip <= steps and shift > 0.
    """
    require_integer(1, steps=steps)
    require_integer(1, steps, skip=skip)
    require_positive(shift=shift)
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    start = uniform * (1 - skip / steps)
    u = torch.stack([1 - (start + j / steps) for j in range(skip + 1)])
    return t_from_u(shift_u(u.clamp(min=0), shift))  # rounding may leave -1e-16


def discrete_consistency_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    times: Tensor,
    condition: Any,
    *,
    teacher: Network,
    target: Network | None = None,
    solver: Solver = "euler",
    norm: Norm = "l2",
) -> Loss:
    """‖x̂0(x, t₀) - sg x̂0(x', t_k)‖² per sample, where x' is k ode_steps of the teacher from x.

    x0, noise: (batch, ...) in units of σd; times: (k + 1, batch), decreasing, for example from
    discrete_times. teacher: guided or not. target: the network whose x̂0 at t_k is the target, such
    as a moving average of the student; None is the student itself. norm: "l2" sums over the
    elements of a sample, "rms" averages.

    Only the prediction at t₀ carries gradients. At t_k = 0 the target is x'. Samples with a
    non-finite x, target or prediction get value 0. Diagnostics: "discrete_consistency" the value,
    and "nonfinite", 1 for such a sample. Raises ValueError for bad shapes or times, and an unknown
    solver or norm.
    """
    error, finite = consistency_error(
        student,
        x0,
        noise,
        times,
        condition,
        teacher=teacher,
        target=student if target is None else target,
        solver=solver,
    )
    value = squared_norm(error, norm)
    return Loss(
        value, {"discrete_consistency": value.detach(), "nonfinite": (~finite).to(x0.dtype)}
    )


def consistency_error(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    times: Tensor,
    condition: Any,
    *,
    teacher: Network,
    target: Network,
    solver: Solver,
) -> tuple[Tensor, Tensor]:
    """x̂0(x, t₀) - sg x̂0(x', t_k), (batch, ...), and which samples are finite, (batch,) bool.

    The arguments are those of discrete_consistency_loss. The error of other samples is zero.
    """
    _check_decreasing(times, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x = interpolate(x0, noise, times[0])
    with torch.no_grad():
        x_end = x
        for t, t_next in pairwise(times):
            x_end = ode_step(teacher, x_end, t, t_next, condition, solver)
        # The random state is restored, so that target and prediction have the same dropout masks.
        with restored_random_state(x):
            x0_target = denoise(target, x_end, times[-1], condition)
        x0_target = torch.where((times[-1] == 0).view(-1, *[1] * (x.ndim - 1)), x_end, x0_target)
        finite = all_finite(x, x0_target)
    # Non-finite samples enter the pass with gradients as zeros: a NaN activation would reach the
    # gradient of the weights as 0 · NaN even with a masked loss.
    prediction = denoise(student, zero_outside(finite, x), times[0], condition)
    finite = finite & all_finite(prediction)
    return zero_outside(finite, prediction - x0_target), finite


def _check_decreasing(times: Tensor, batch: int) -> None:
    """Raise ValueError unless times is (k + 1, batch), k >= 1, and decreases along k."""
    if times.ndim != 2 or len(times) < 2:
        raise ValueError(
            f"times has shape {tuple(times.shape)}; expected the k + 1 >= 2 times of k steps for "
            f"each sample, (k + 1, {batch})"
        )
    for t in times:
        check_times(t, batch)
    if not bool((times[1:] < times[:-1]).all()):
        raise ValueError("times must decrease along the first dimension")
