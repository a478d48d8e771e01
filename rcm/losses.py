"""What a loss is here, and the simplest one: flow matching.

A loss is a plain function that returns one value per sample, unreduced, and what there is to
watch. Losses add and scale like the formulas they come from; rCM (2510.08431) is

    consistency_loss(...) + 0.01 * score_loss(...)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm.trigflow import Network, check_like, check_times, interpolate, network_time, velocity


@dataclass(frozen=True)
class Loss:
    """value (batch,) carries the gradient; diagnostics are detached, (batch,) each."""

    value: Tensor
    diagnostics: dict[str, Tensor]

    def __add__(self, other: "Loss") -> "Loss":
        if shared := self.diagnostics.keys() & other.diagnostics.keys():
            raise ValueError(f"both losses report {sorted(shared)}; names must differ")
        check_like("one loss", self.value, "the other", other.value)
        return Loss(self.value + other.value, self.diagnostics | other.diagnostics)

    def __rmul__(self, weight: float) -> "Loss":
        return Loss(weight * self.value, self.diagnostics)


def per_sample(tensor: Tensor) -> Tensor:
    """(batch, ...) -> (batch, elements)."""
    return tensor.flatten(1)


def all_finite(*tensors: Tensor) -> Tensor:
    """(batch,) bool: which samples hold no NaN and no infinity in any of the tensors."""
    return torch.stack([per_sample(x.isfinite()).all(1) for x in tensors]).all(0)


def keep(mask: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with samples outside mask (batch,) set to zero. Multiplying by the mask instead
    would turn a NaN into a NaN."""
    mask = mask.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def flow_matching_loss(net: Network, x0: Tensor, noise: Tensor, t: Tensor, condition: Any) -> Loss:
    """The mean over elements of (F(x, t) - dx/dt)², x = cos(t) x0 + sin(t) z (sCM §3).

    It trains a teacher on data, and rCM's critic (the "fake score") on the student's samples.
    x0, noise: (batch, ...) in units of σd; t: (batch,). Raises ValueError for unequal shapes or
    times outside [0, π/2].
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x = interpolate(x0, noise, t)
    error = net(x, network_time(t, x), condition) - velocity(x0, noise, t)
    value = per_sample(error).square().mean(1)
    return Loss(value, {"flow_matching": value.detach()})
