"""Conditional Gaussian data, whose guided flow map has a closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.guidance import GuidedCondition
from tests.rcm.analytic_networks import Gaussian


@dataclass(frozen=True)
class GuidedGaussian:
    """Data N(condition, std²) for condition (batch,), N(null_mean, std²) without a condition.

    Velocities of one std are affine in the mean. So v_u + w (v_c - v_u) is the velocity of
    N(m, std²) with m = null_mean + w (condition - null_mean).
    """

    null_mean: float = -0.2
    std: float = 0.4

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.null_mean)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Without guidance: E[v|x, condition]."""
        return Gaussian(condition[:, None], self.std).velocity(x, t)  # type: ignore[arg-type]

    def flow_map_network(
        self, x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor | None = None
    ) -> Tensor:
        """F of the exact flow map under guidance in the interval [0, π/2]."""
        mean = self.null_mean + condition.scale * (condition.condition - self.null_mean)
        data = Gaussian(mean[:, None], self.std)  # type: ignore[arg-type]
        return data.flow_map_network(x, t, None, end)
