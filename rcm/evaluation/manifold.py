"""Precision and recall of samples, from nearest neighbours (Kynkäänniemi et al., 1904.06991).

A set of features stands for the union of balls around them; the radius of each ball is the distance
to its k-th nearest other feature. With P the real features and Q the generated ones, precision is
the fraction of Q inside the balls of P, recall the fraction of P inside the balls of Q. A student
that lost a mode of the data has a low recall; its precision and its label agreement may be perfect.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3  # the paper's k
CHUNK = 2**22  # distances at a time: 32 MiB
# The square of a distance is a difference of squares, computed in float64: it is wrong by up to
# (1e-7)² of the squared norms of its two features.
ROUNDING = 1e-6


class Manifold:
    """The union of the balls around features."""

    def __init__(self, features: Tensor, k: int = NEIGHBOURS) -> None:
        """features: (n, dim), n > k. Raises ValueError for another shape or non-finite features."""
        if features.ndim != 2 or len(features) <= k:
            raise ValueError(
                f"features must be (n, dim) with n > {k}, the number of neighbours, got "
                f"{tuple(features.shape)}"
            )
        _require_finite(features)
        # Small norms round little. One feature far from the others would move a mean to it.
        self.origin = features.double().median(0).values
        self.centres = features.double() - self.origin
        self.norms = self.centres.norm(dim=1)
        # The nearest of all is the feature itself.
        nearest = [d.topk(k + 1, largest=False).values[:, k] for d in self._distances(self.centres)]
        self.radii = torch.cat(nearest)

    def coverage(self, features: Tensor) -> float:
        """The fraction of features (m, dim) inside at least one ball. Raises ValueError."""
        if features.ndim != 2 or features.shape[1] != self.centres.shape[1] or not len(features):
            raise ValueError(
                f"features must be (m, {self.centres.shape[1]}) with m ≥ 1, got "
                f"{tuple(features.shape)}"
            )
        _require_finite(features)
        points = features.double() - self.origin
        norms = points.norm(dim=1).split(self._rows)
        inside = 0
        for distances, own in zip(self._distances(points), norms, strict=True):
            rounding = ROUNDING * torch.maximum(own[:, None], self.norms)
            reach = self.radii.square() + rounding.square()
            inside += int((distances.square() <= reach).any(1).sum())
        return inside / len(points)

    @property
    def _rows(self) -> int:
        """The number of points whose distances are computed at a time."""
        return max(1, CHUNK // len(self.centres))

    def _distances(self, points: Tensor) -> Iterator[Tensor]:
        """Distances (some of m, n) of points (m, dim) to the centres, a few rows at a time."""
        return (torch.cdist(chunk, self.centres) for chunk in points.split(self._rows))


def precision_and_recall(
    samples: Tensor, real: Manifold, real_features: Tensor
) -> tuple[float, float]:
    """Of the features (n, dim) of samples; `real` is the manifold of real_features (m, dim)."""
    return real.coverage(samples), Manifold(samples).coverage(real_features)


def _require_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise ValueError("features contain NaN or infinity")
