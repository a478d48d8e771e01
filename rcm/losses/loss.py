"""The result type of every loss, norms of samples, and helpers for non-finite samples.

A loss returns one value per sample, unreduced, and named diagnostics. Losses can be added and
scaled like the formulas in the papers; rCM (2510.08431) is

    consistency_loss(...) + 0.01 * score_loss(...)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rcm.trigflow import check_like

Norm = Literal["rms", "l2"]


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
    """Flatten each sample: (batch, ...) -> (batch, elements)."""
    return tensor.flatten(1)


def all_finite(*tensors: Tensor) -> Tensor:
    """(batch,) bool: True for samples without NaN and infinity in all of the tensors."""
    return torch.stack([per_sample(x.isfinite()).all(1) for x in tensors]).all(0)


def zero_outside(mask: Tensor, tensor: Tensor) -> Tensor:
    """Set the samples outside mask (batch,) to zero.

    It selects instead of multiplying by the mask, because 0 · NaN is NaN.
    """
    mask = mask.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def squared_norm(tensor: Tensor, norm: Norm) -> Tensor:
    """Mean ("rms") or sum ("l2") of the squares of each sample: (batch, ...) -> (batch,)."""
    if norm == "rms":
        return per_sample(tensor).square().mean(1)
    if norm == "l2":
        return per_sample(tensor).square().sum(1)
    raise ValueError(f"norm {norm!r} is unknown; allowed are 'rms' and 'l2'")


def sample_norm(tensor: Tensor, norm: Norm) -> Tensor:
    """Root mean square ("rms") or Euclidean norm ("l2") per sample: (batch, ...) -> (batch,)."""
    return squared_norm(tensor, norm).sqrt()
