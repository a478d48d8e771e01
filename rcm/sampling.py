"""Samplers of consistency models and of flow maps, and Heun's method along a teacher's ODE.

All start from pure noise z ~ N(0, 1) (batch, ...), return samples in units of σd, and take their
schedule as float64 times. All randomness comes from arguments.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from rcm.ode import ode_step
from rcm.trigflow import Network, check_like, denoise, flow_map, interpolate

# From rCM's code. Its paper uses (1.3, 1.0, 0.6); sCM's two-step sampler uses 1.1.
MID_TIMES = (1.5, 1.4, 1.0)


def consistency_times(
    steps: int,
    *,
    sigma_max: float = 80.0,
    sigma_data: float = 1.0,
    mid_times: Sequence[float] = MID_TIMES,
) -> Tensor:
    """Times [atan(σ_max / σd), then the first steps - 1 of mid_times]: (steps,) float64.

    Papers append 0, the time of the result; no network is evaluated there. A larger σ_max trades
    diversity for quality. Raises ValueError if steps is not in 1..len(mid_times) + 1 or
    the times do not decrease.
    """
    if not 1 <= steps <= len(mid_times) + 1:
        raise ValueError(
            f"steps is {steps}; with {len(mid_times)} mid times it must be in "
            f"1..{len(mid_times) + 1}"
        )
    times = [math.atan(sigma_max / sigma_data), *mid_times[: steps - 1]]
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise ValueError(f"times must decrease, got {times}")
    return torch.tensor(times, dtype=torch.float64)


def consistency_sample(
    net: Network,
    noise: Tensor,
    times: Tensor,
    condition: Any,
    *,
    noise_source: Generator | Sequence[Tensor] = (),
) -> Tensor:
    """Alternate x̂0 = f(x, t) and adding new noise; return the last x̂0.

    noise: (batch, ...); times: (steps,) for all samples, or (steps, batch). noise_source: the noise
    of steps 2, 3, ..., as a generator or as steps - 1 tensors shaped like noise.

    Only the last step carries gradients. With autograd this is the student rollout of rCM
    (2510.08431), under torch.no_grad a sampler. Raises ValueError if noise_source has too few
    tensors or a tensor of another shape.
    """
    rows = times.to(noise.device).view(len(times), -1).expand(-1, noise.shape[0])
    if not isinstance(noise_source, Generator) and len(noise_source) < len(rows) - 1:
        raise ValueError(
            f"{len(rows)} steps need a generator or {len(rows) - 1} tensors of noise, got "
            f"{len(noise_source)}"
        )
    x = interpolate(torch.zeros_like(noise), noise, rows[0])
    for step, (t, t_next) in enumerate(pairwise(rows)):
        with torch.no_grad():
            x0 = denoise(net, x, t, condition)
        if isinstance(noise_source, Generator):
            z = torch.randn(
                noise.shape,
                generator=noise_source,
                device=noise_source.device,
                dtype=noise.dtype,
            )
        else:
            z = noise_source[step]
            check_like(f"noise_source[{step}]", z, "noise", noise)
        x = interpolate(x0, z.to(noise), t_next)
    return denoise(net, x, rows[-1], condition)


def heun_times(steps: int, *, sigma_max: float = 80.0, sigma_data: float = 1.0) -> Tensor:
    """Equally spaced times from atan(σ_max / σd) to 0: (steps + 1,) float64.

    Equal steps suit TrigFlow because |dx/dt| is about 1 at every t. Raises ValueError if steps is
    below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
    start = math.atan(sigma_max / sigma_data)
    return torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)


@torch.no_grad()
def heun_sample(net: Network, noise: Tensor, times: Tensor, condition: Any) -> Tensor:
    """Follow the probability-flow ODE dx/dt = F(x, t) with Heun's second-order method.

    noise: (batch, ...); times: (steps + 1,) decreasing to 0. The network is evaluated
    2 steps - 1 times: the last step only denoises (an Euler step in EDM's σ, 2206.00364), because
    F(x, 0) is never trained. One step therefore returns the teacher's blurry mean. Raises
    ValueError unless times decrease to 0.
    """
    rows = _rows_down_to_zero(times, noise)
    x = interpolate(torch.zeros_like(noise), noise, rows[0])
    for t, t_next in pairwise(rows[:-1]):
        x = ode_step(net, x, t, t_next, condition, "heun")
    return denoise(net, x, rows[-2], condition)


@torch.no_grad()
def flow_map_sample(net: Network, noise: Tensor, times: Tensor, condition: Any) -> Tensor:
    """Jump from time to time with a flow map (AYF, 2506.14603), adding no noise.

    noise: (batch, ...); times: (steps + 1,) decreasing to 0, such as heun_times. The network is
    evaluated once per step. Raises ValueError unless times decrease to 0.
    """
    rows = _rows_down_to_zero(times, noise)
    x = interpolate(torch.zeros_like(noise), noise, rows[0])
    for t, end in pairwise(rows):
        x = flow_map(net, x, t, end, condition)
    return x


def _rows_down_to_zero(times: Tensor, noise: Tensor) -> Tensor:
    """times (steps + 1,) -> (steps + 1, batch), checked to decrease to 0."""
    steps = times.tolist()
    if len(steps) < 2 or steps[-1] != 0 or any(b >= a for a, b in pairwise(steps)):
        raise ValueError(f"times must decrease to 0 in at least one step, got {steps}")
    return times.to(noise.device).view(-1, 1).expand(-1, noise.shape[0])
