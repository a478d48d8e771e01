"""Distribution matching distillation (DMD), the score regulariser of rCM.

The consistency loss covers all modes, but it blurs details and its errors accumulate over t. DMD
(DMD2, 2405.14867; rCM, 2510.08431) moves a sample G of the student towards higher teacher density
relative to the student's density. A critic, the "fake score", learns the student's density by flow
matching on the student's samples:

    critic:   flow_matching_loss(fake_score, G.detach(), noise, t_D, condition)
    student:  score_loss(G, noise, t_D, condition, teacher=..., fake_score=...)

G comes from sampling.consistency_sample, with gradients, at times from time_sampling.rollout_times.
"""

from typing import Any

import torch
from torch import Tensor

from rcm.losses.loss import Loss, all_finite, per_sample, zero_outside
from rcm.trigflow import Network, check_like, check_times, denoise, interpolate


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

    f is the x̂0 of a network at x = cos(t) G + sin(t) z. The divisor m = mean |G - f_teacher| per
    sample, at least 1e-5, makes the gradient 2 (f_fake - f_teacher) / m comparable over t. The loss
    is a sum like consistency_loss with tangent_norm="l2"; a mean would make the regulariser
    negligible for large samples.

    generated G: (batch, ...) in units of σd, with gradients; noise: (batch, ...); t: (batch,).
    Non-finite samples get value 0 and no gradient. Diagnostics: "dmd" the value, "dmd_scale" m, and
    "dmd_nonfinite", 1 for a non-finite sample. Raises ValueError for bad shapes or times.
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
    value = per_sample(zero_outside(finite, generated - (sample - step))).square().sum(1)
    return Loss(
        value,
        {
            "dmd": zero_outside(finite, value.detach()),
            "dmd_scale": zero_outside(finite, scale),
            "dmd_nonfinite": (~finite).to(sample.dtype),
        },
    )
