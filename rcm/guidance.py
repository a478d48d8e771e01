"""Classifier-free guidance (2207.12598): V = F_c + (w - 1) (F_c - F_u), w = 1 is no guidance.

F_c has the condition and F_u an empty or a negative one. w is called the scale; LCM (2310.04378)
and others write w - 1 for it. An interval of times applies guidance only where it helps, not at
high noise, where it drops modes (2404.07724).

    guided           a network with guidance, such as the teacher of a distillation
    Guidance         the setting of a method: a fixed or a random scale, and the interval
    GuidedCondition  a condition for networks that take the guidance as an input (iMF, 2512.02012)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from rcm.trigflow import Network
from rcm.validation import require_number, require_numbers

MAX_SCALE = 1000.0
TIME_ROUNDING = 1e-6  # t of an end of the interval may be rounded to float32


class GuidedCondition(NamedTuple):
    """The condition of a network with guidance as an input."""

    condition: Any
    """The condition without guidance, such as labels."""
    scale: Tensor
    """Guidance scale w (batch,)."""
    low: Tensor
    """First t of the guidance interval (batch,)."""
    high: Tensor
    """Last t of the guidance interval (batch,)."""


def guided(
    net: Network,
    null_condition: Callable[[Any], Any],
    scale: float | Tensor,
    interval: tuple[float | Tensor, float | Tensor] | None = None,
) -> Network:
    """The network with guidance: F_c + (w - 1) (F_c - F_u).

    null_condition maps a batch's condition to the empty or negative condition of that batch. scale:
    a number or (batch,). Samples with scale 1 and samples whose t is outside of the interval (low,
    high), numbers or (batch,), have exactly the value of the conditional network. With the number
    1, F_u is not evaluated. `end` is passed on; a combination of flow maps is itself the flow map
    of guided sampling only for end = t.

    Raises ValueError if the number is outside of [0, 1000]; the network raises it if a scale or an
    end of the interval is a tensor that does not have one element per sample.
    """
    if not isinstance(scale, Tensor):
        require_number("[]", 0, MAX_SCALE, scale=scale)
        if scale == 1:
            return net

    def wrapped(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        second_time = {} if end is None else {"end": end}
        weight = _per_sample("scale", scale, t)
        if interval is not None:
            low, high = _per_sample("low", interval[0], t), _per_sample("high", interval[1], t)
            inside = (t >= low - TIME_ROUNDING) & (t <= high + TIME_ROUNDING)
            weight = torch.where(inside, weight, 1.0)
        conditional = net(x, t, condition, **second_time)
        unconditional = net(x, t, null_condition(condition), **second_time)
        weight = weight.to(torch.promote_types(conditional.dtype, torch.float32))
        weight = weight.view(-1, *[1] * (x.ndim - 1))
        extrapolated = conditional + (weight - 1) * (conditional - unconditional)
        return torch.where(weight == 1, conditional, extrapolated).to(conditional.dtype)

    return wrapped


def _per_sample(name: str, value: float | Tensor, t: Tensor) -> Tensor:
    """value as (batch,) float64 on the device of t."""
    if not isinstance(value, Tensor):
        return torch.full_like(t, value, dtype=torch.float64)
    if value.shape != t.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected a number or one per sample, "
            f"{tuple(t.shape)}"
        )
    return value.to(t.device, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The guidance of a teacher: a fixed scale, or one drawn for each sample, as LCM does."""

    scale: float = 1.0
    """Guidance scale; 1 is the conditional network alone."""
    max_scale: float | None = None
    """If given, scales are uniform in [scale, max_scale]."""
    interval: tuple[float, float] | None = None
    """First and last t with guidance; None is all times."""

    def __post_init__(self) -> None:
        require_number("[]", 0, MAX_SCALE, scale=self.scale)
        if self.max_scale is not None:
            require_number("(]", self.scale, MAX_SCALE, max_scale=self.max_scale)
        if self.interval is not None:
            require_numbers(2, interval=self.interval)
            low, high = self.interval
            require_number("[)", 0, math.pi / 2, **{"interval[0]": low})
            require_number("(]", low, math.pi / 2, **{"interval[1]": high})

    @property
    def active(self) -> bool:
        """Whether any sample can have a scale other than 1."""
        return self.scale != 1 or self.max_scale is not None

    def draw(self, count: int, generator: Generator) -> Tensor | None:
        """Scales (count,) float64 on the generator's device, or None without guidance.

        Only random scales use the generator.
        """
        if not self.active:
            return None
        if self.max_scale is None:
            return torch.full((count,), self.scale, dtype=torch.float64, device=generator.device)
        uniform = torch.rand(
            count, generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.scale + (self.max_scale - self.scale) * uniform
