"""The score regulariser of rCM: distribution matching on the student's own samples.

Consistency alone covers all modes and blurs details; its errors add up over t. Distribution
matching (DMD2, 2405.14867; rCM, 2510.08431) pulls a sample G of the student towards where the
teacher's density is higher than the student's. The student's density is unknown, so a critic, the
"fake score", learns it by flow matching on samples of the student:

    critic:   flow_matching_loss(fake_score, G.detach(), noise, t_D, condition)
    student:  score_loss(G, noise, t_D, condition, teacher=..., fake_score=...)

G comes from sampling.consistency_sample, with gradients, at the times drawn by rollout_times.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from rcm.losses import Loss, all_finite, keep, per_sample
from rcm.times import TimeDistribution
from rcm.trigflow import Network, check_like, check_times, denoise, interpolate


def rollout_times(
    steps: int, count: int, distribution: TimeDistribution, generator: Generator
) -> Tensor:
    """Times of a student rollout: (steps, count) float64, t₁ = π/2, tₙ₊₁ = min(t̂ ~ p_D, tₙ).

    Random times teach the student to sample well under any schedule; rCM draws steps from 1..4.
    """
    if steps < 1:
        raise ValueError(f"a rollout has at least one step, got {steps}")
    drawn = [torch.full((count,), torch.pi / 2, dtype=torch.float64, device=generator.device)]
    drawn += [distribution(count, generator) for _ in range(steps - 1)]
    return torch.cummin(torch.stack(drawn), dim=0).values


def score_loss(
    generated: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Any,
    *,
    teacher: Network,
    fake_score: Network,
) -> Loss:
    """‖G - sg(G - (f_fake - f_teacher) / m)‖², summed over elements: DMD2's gradient as a loss.

    f = x̂0 of either network at x = cos(t) G + sin(t) z, and m = mean |G - f_teacher| per sample,
    at least 1e-5, makes the gradient, 2 (f_fake - f_teacher) / m, comparable over t. The sum
    matters: consistency_loss with tangent_norm="l2" is a sum too, and a mean would make the
    regulariser vanish against it as samples get larger.

    generated G: (batch, ...) in units of σd, with gradients; noise: (batch, ...); t: (batch,).
    Samples that are not finite get value 0 and no gradient, and are counted in the diagnostic
    "dmd_nonfinite". Raises ValueError for bad shapes or times.
    """
    check_times(t, generated.shape[0])
    check_like("noise", noise, "generated", generated)
    sample = generated.detach()
    with torch.no_grad():
        x = interpolate(sample, noise, t)
        f_teacher = denoise(teacher, x, t, condition)
        direction = denoise(fake_score, x, t, condition) - f_teacher
        # float64: the mean over a video has millions of terms.
        scale = per_sample(sample.double() - f_teacher.double()).abs().mean(1).clamp(min=1e-5)
        step = direction / scale.to(direction.dtype).view(-1, *[1] * (x.ndim - 1))
        finite = all_finite(step)
    value = per_sample(keep(finite, generated - (sample - step))).square().sum(1)
    return Loss(
        value,
        {
            "dmd": keep(finite, value.detach()),
            "dmd_scale": keep(finite, scale),
            "dmd_nonfinite": (~finite).to(sample.dtype),
        },
    )
