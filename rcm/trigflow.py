"""TrigFlow: the time is an angle t and the network output F is the velocity (sCM, 2410.11081 §3).

    x = cos(t) x0 + sin(t) z        F(x, t) predicts dx/dt = cos(t) z - sin(t) x0
    x̂0 = cos(t) x - sin(t) F        ẑ = sin(t) x + cos(t) F                  t in [0, π/2]

Units. x0, z, x and F are in units of σd, the standard deviation of the data: divide the data by σd
when loading it and multiply the samples by σd at the end. z is then N(0, 1). σd appears only in
formulas with a noise level: σ = σd tan(t).

A network is a callable `net(x, t, condition) -> F`. The whole package uses this signature;
network_conversions.py wraps networks that predict something else.

A flow map takes x at t to the point of the same ODE trajectory at an earlier time s:

    f(x, t, s) = cos(t - s) x - sin(t - s) F(x, t, s)                        s in [0, t]

Its network is `net(x, t, condition, end=s) -> F`. F(x, t, t) is the velocity, and s = 0 gives the
consistency function.

Precision. Schedules are float64 and networks receive the time in float32 or float64. Neighbouring
bfloat16 numbers near 900 differ by 4, so a network that receives 1000 u in bfloat16 cannot tell
987.7 from 988.3. Its derivative with respect to time is then noise, and distillation collapses.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """F(x, t): x (batch, ...), t (batch,) float32 or float64, any condition -> (batch, ...).

    end: (batch,) like t, in [0, t], the second time of a flow map; None for a network of one time.
    Callers omit it for such a network, which then needs no such parameter.
    """

    def __call__(
        self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None
    ) -> Tensor: ...


# ---- the path ----------------------------------------------------------------------------------


def cos_sin(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos(t) and sin(t), shaped to broadcast over `like`: t (batch,), like (batch, ...).

    They are computed in t's dtype, then cast to the dtype of `like`, or to float32 if that has
    fewer bits.
    """
    shape = (-1, *[1] * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.cos(t).to(dtype).view(shape), torch.sin(t).to(dtype).view(shape)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The path x = cos(t) x0 + sin(t) z: x0, noise (batch, ...), t (batch,) -> (batch, ...)."""
    cos, sin = cos_sin(t, x0)
    return (cos * x0 + sin * noise).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The velocity dx/dt = cos(t) z - sin(t) x0 of the path: the target of flow matching."""
    cos, sin = cos_sin(t, x0)
    return (cos * noise - sin * x0).to(x0.dtype)


def denoised(x: Tensor, f: Tensor, t: Tensor) -> Tensor:
    """The data prediction x̂0 = cos(t) x - sin(t) F; for a consistency model, f(x, t)."""
    cos, sin = cos_sin(t, x)
    return (cos * x - sin * f).to(x.dtype)


def evaluate(
    net: Network, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None
) -> Tensor:
    """F of a flow map, or of a network of one time, which need not have the parameter `end`."""
    time = network_time(t, x)
    if end is None:
        return net(x, time, condition)
    return net(x, time, condition, end=network_time(end, x))


def denoise(net: Network, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """The data prediction x̂0 of a network: x (batch, ...), t (batch,) -> (batch, ...)."""
    return denoised(x, evaluate(net, x, t, condition), t)


def flow_map(net: Network, x: Tensor, t: Tensor, end: Tensor, condition: Any) -> Tensor:
    """f = cos(t - s) x - sin(t - s) F(x, t, s): x (batch, ...), t and end = s (batch,) -> like x.

    Raises ValueError unless end is shaped like t, float32 or float64, and within [0, t].
    """
    check_end(end, t)
    return denoised(x, evaluate(net, x, t, condition, end), t - end)


# ---- checks ------------------------------------------------------------------------------------


def check_times(t: Tensor, batch: int) -> None:
    """Raise ValueError unless t is (batch,), float32 or float64, and within [0, π/2]."""
    require_precise_time(t)
    if t.shape != (batch,):
        raise ValueError(f"t has shape {tuple(t.shape)}; expected one time per sample, ({batch},)")
    # The float32 nearest to π/2 is 4e-8 above π/2.
    if not bool(((t >= 0) & (t <= math.pi / 2 + 1e-6)).all()):
        low, high = t.min().item(), t.max().item()
        raise ValueError(f"t lies in [{low:.6g}, {high:.6g}]; TrigFlow times lie in [0, π/2]")


def check_end(end: Tensor, t: Tensor) -> None:
    """Raise ValueError unless end is shaped like t, float32 or float64, and within [0, t]."""
    require_precise_time(end)
    check_like("end", end, "t", t)
    # Rounding to float32 may lift end above t by 6e-8.
    if not bool(((end >= 0) & (end <= t + 1e-6)).all()):
        low, above = end.min().item(), (end - t).max().item()
        raise ValueError(
            f"min(end) is {low:.6g} and max(end - t) is {above:.6g}; the end of a flow map lies in "
            "[0, t]"
        )


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have the same shape; broadcasting would hide a bug."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {other_name} has {tuple(other.shape)}; "
            "they must be equal"
        )


def require_precise_time(t: Tensor) -> None:
    """Raise ValueError if t has fewer bits than float32."""
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"time has dtype {t.dtype}; allowed are float32 and float64. Common causes are a cast "
            "of the timestep to the model's dtype and FSDP2's MixedPrecisionPolicy with "
            "cast_forward_inputs=True"
        )


def network_time(t: Tensor, x: Tensor) -> Tensor:
    """The time passed to a network: float32, or float64 if x is float64."""
    require_precise_time(t)
    return t.to(torch.promote_types(x.dtype, torch.float32))
