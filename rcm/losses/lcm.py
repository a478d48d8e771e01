"""Latent consistency models (LCM, 2310.04378): discrete consistency on the timesteps of DDPM.

The teacher is a network with a variance-preserving schedule, such as Stable Diffusion, mostly with
guidance. LCM is the discrete consistency loss with

    f(x, i) = c_skip x + c_out x̂0(x, t_i)            s = 10 i, σ = 0.5
    c_skip  = σ² / (s² + σ²),  c_out = s / √(s² + σ²)

instead of x̂0, one DDIM step over 20 timesteps, and a pseudo-Huber distance. f is x at timestep 0,
whatever the network, and almost x̂0 at all others. s, σ, the timesteps and the distance are those of
diffusers' training scripts and its LCMScheduler.

    f                   lcm_network(net, schedule), a TrigFlow network whose x̂0 is f
    loss                lcm_loss, at timesteps from lcm_timesteps
    sampling            consistency_sample(lcm_network(net, schedule), noise, schedule.t(timesteps),
                        ...); for four steps LCM takes the timesteps 999, 759, 499, 259
    guidance            teacher=guided(net, null_condition, w), w drawn for each sample. A student
                        that takes w as an input receives it in its condition
"""

from typing import Any

import torch
from torch import Generator, Tensor

from rcm.losses.discrete_consistency import consistency_error
from rcm.losses.loss import Loss, per_sample
from rcm.time_conversions import VPSchedule
from rcm.trigflow import Network, check_like
from rcm.validation import require_integer, require_positive

TIMESTEP_SCALE = 10.0
SIGMA = 0.5


def lcm_timesteps(
    count: int, generator: Generator, *, timesteps: int = 1000, skip: int = 20
) -> tuple[Tensor, Tensor]:
    """Neighbouring timesteps of a sampler that skips `skip` of them: (count,) int64 each.

    The first is one of skip - 1, 2 skip - 1, ... with equal probability, the next is `skip` lower,
    at least 0. timesteps: their number in the schedule. Raises ValueError unless 2 <= skip <=
    timesteps.
    """
    require_integer(2, timesteps=timesteps)
    require_integer(2, timesteps, skip=skip)
    step = torch.randint(timesteps // skip, (count,), generator=generator, device=generator.device)
    timestep = (step + 1) * skip - 1
    return timestep, (timestep - skip).clamp(min=0)


def lcm_network(net: Network, schedule: VPSchedule) -> Network:
    """The TrigFlow network whose x̂0 is f = c_skip x + c_out x̂0 of `net`.

    t must lie within the schedule and above 0; between timesteps c_skip and c_out are interpolated.
    The network raises ValueError otherwise, and for an `end`: f has none.
    """

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        if end is not None:
            raise ValueError("LCM's f maps to the data; it takes no end")
        s = TIMESTEP_SCALE * schedule.timestep(t)
        c_skip = SIGMA**2 / (s**2 + SIGMA**2)
        c_out = s / torch.sqrt(s**2 + SIGMA**2)
        # cos(t) x - sin(t) F' = c_skip x + c_out (cos(t) x - sin(t) F), solved for F'.
        of_x = ((1 - c_out) * torch.cos(t.double()) - c_skip) / torch.sin(t.double())
        dtype = torch.promote_types(x.dtype, torch.float32)
        of_x, of_f = (c.to(dtype).view(-1, *[1] * (x.ndim - 1)) for c in (of_x, c_out))
        return of_x * x + of_f * net(x, t, condition)

    return wrapped


def lcm_loss(
    student: Network,
    x0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    next_timestep: Tensor,
    condition: Any,
    *,
    schedule: VPSchedule,
    teacher: Network,
    target: Network | None = None,
    huber_c: float = 1e-3,
) -> Loss:
    """The mean over elements of √(d² + c²) - c, d = f(x, t) - sg f(x', t'), per sample.

    x' is one DDIM step of the teacher from x at t to t', the times of timestep and next_timestep.

    student, teacher, target: TrigFlow networks; lcm_loss applies lcm_network to student and target.
    x0, noise: (batch, ...) in units of σd; timestep, next_timestep: (batch,) integers, the second
    lower, for example from lcm_timesteps. target: the network of f(x', t'), a moving average of the
    student in LCM; None is the student itself. huber_c: c, where the distance changes from
    quadratic to linear.

    Only f(x, t) carries gradients. Samples with a non-finite x, target or f get value 0.
    Diagnostics: "lcm" the value, and "nonfinite", 1 for such a sample. Raises ValueError for bad
    shapes and timesteps, and unless huber_c is positive.
    """
    require_positive(huber_c=huber_c)
    _check_timesteps(timestep, next_timestep)
    error, finite = consistency_error(
        lcm_network(student, schedule),
        x0,
        noise,
        torch.stack([schedule.t(timestep), schedule.t(next_timestep)]).to(x0.device),
        condition,
        teacher=teacher,
        target=lcm_network(student if target is None else target, schedule),
        solver="ddim",
    )
    # √(d² + c²) - c without the cancellation of small d.
    square = error.square()
    value = per_sample(square / (torch.sqrt(square + huber_c**2) + huber_c)).mean(1)
    return Loss(value, {"lcm": value.detach(), "nonfinite": (~finite).to(x0.dtype)})


def _check_timesteps(timestep: Tensor, next_timestep: Tensor) -> None:
    """Raise ValueError unless both are integers of the same shape and the second is lower."""
    for name, tensor in (("timestep", timestep), ("next_timestep", next_timestep)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} has dtype {tensor.dtype}; timesteps of DDPM are integers")
    check_like("next_timestep", next_timestep, "timestep", timestep)
    if not bool((next_timestep < timestep).all()):
        raise ValueError("next_timestep must be below timestep for each sample")
