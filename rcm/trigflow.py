"""TrigFlow: one angle t for the time, one network output F for the velocity (sCM, 2410.11081 §3).

    x = cos(t) x0 + sin(t) z        F(x, t) predicts dx/dt = cos(t) z - sin(t) x0
    x̂0 = cos(t) x - sin(t) F        ẑ = sin(t) x + cos(t) F                  t in [0, π/2]

Units. x0, z, x and F are all measured in σd, the standard deviation of the data: divide the data
by σd once, when loading it, and multiply the samples by σd once, at the end. z is then N(0, 1),
and σd itself appears only where a noise level σ does: σ = σd tan(t).

A network is a callable `net(x, t, condition) -> F`. Everything in this package is written for
that one signature; predictions.py brings networks that predict something else to it.

Precision. A schedule is float64 and a network sees its time in float32 or better, always. In
bfloat16 the numbers near 900 are 4 apart, so a network fed 1000 u cannot tell 987.7 from 988.3:
its derivative with respect to time is noise, and distillation collapses.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Network(Protocol):
    """F(x, t): x (batch, ...), t (batch,) float32 or float64, any condition -> (batch, ...)."""

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor: ...


# ---- the path ----------------------------------------------------------------------------------


def cos_sin(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos(t), sin(t) of t (batch,), taken in t's own precision, then shaped to broadcast over
    `like` (batch, ...) and cast to its dtype (float32 if `like` has fewer bits)."""
    shape = (-1, *[1] * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.cos(t).to(dtype).view(shape), torch.sin(t).to(dtype).view(shape)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The path x = cos(t) x0 + sin(t) z: x0, noise (batch, ...), t (batch,) -> (batch, ...)."""
    cos, sin = cos_sin(t, x0)
    return (cos * x0 + sin * noise).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Its derivative dx/dt = cos(t) z - sin(t) x0: what F regresses to in flow matching."""
    cos, sin = cos_sin(t, x0)
    return (cos * noise - sin * x0).to(x0.dtype)


def denoised(x: Tensor, f: Tensor, t: Tensor) -> Tensor:
    """The data x̂0 = cos(t) x - sin(t) F that F stands for; for a consistency model, f(x, t)."""
    cos, sin = cos_sin(t, x)
    return (cos * x - sin * f).to(x.dtype)


def denoise(net: Network, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """The x̂0 of a network: x (batch, ...), t (batch,) -> (batch, ...)."""
    return denoised(x, net(x, network_time(t, x), condition), t)


# ---- clocks ------------------------------------------------------------------------------------


def sigma_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """EDM noise level σ = σd tan(t) of x0 + σ ε, the same path up to the scale cos(t)."""
    return sigma_data * torch.tan(t)


def t_from_sigma(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, t = atan(σ / σd); σ = inf is π/2."""
    return torch.atan(sigma / sigma_data)


def t_from_signal_noise(signal: Tensor, noise: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of the same signal-to-noise ratio as a·x0 + s·ε, ε ~ N(0, 1), x0 in data units."""
    return torch.atan2(noise, sigma_data * signal)


def t_from_u(u: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of rectified flow's u in [0, 1], whose path is (1 - u) x0 + u ε."""
    return t_from_signal_noise(1 - u, u, sigma_data)


def u_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, u = σd sin(t) / (cos(t) + σd sin(t))."""
    noise = sigma_data * torch.sin(t)
    return noise / (torch.cos(t) + noise)


# ---- guards ------------------------------------------------------------------------------------


def check_times(t: Tensor, batch: int) -> None:
    """Raise ValueError unless t is (batch,), float32 or float64, and within [0, π/2]."""
    require_precise_time(t)
    if t.shape != (batch,):
        raise ValueError(f"t has shape {tuple(t.shape)}; needed is one time per sample, ({batch},)")
    # The float32 nearest to π/2 is 4e-8 above π/2.
    if not bool(((t >= 0) & (t <= math.pi / 2 + 1e-6)).all()):
        low, high = t.min().item(), t.max().item()
        raise ValueError(f"t lies in [{low:.6g}, {high:.6g}]; TrigFlow times lie in [0, π/2]")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape: here broadcasting is always a bug."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {other_name} has {tuple(other.shape)}; "
            "they must be equal"
        )


def require_precise_time(t: Tensor) -> None:
    """Raise ValueError if t has fewer bits than float32."""
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"time has dtype {t.dtype}; allowed are float32 and float64. Look for a cast of the "
            "timestep to the model's dtype, or for FSDP2's MixedPrecisionPolicy with "
            "cast_forward_inputs=True"
        )


def network_time(t: Tensor, x: Tensor) -> Tensor:
    """The t that a network sees: float32, or float64 beside a float64 x."""
    require_precise_time(t)
    return t.to(torch.promote_types(x.dtype, torch.float32))


def guard_time(embedding: nn.Module) -> RemovableHandle:
    """Make the module that embeds the timestep of a network of yours (its first argument) refuse
    times below float32, where a cast inside that network would otherwise go unnoticed."""

    def refuse(_: nn.Module, args: tuple[Any, ...]) -> None:
        require_precise_time(args[0])

    return embedding.register_forward_pre_hook(refuse)
