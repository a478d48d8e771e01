"""A mixture of five Gaussians in the plane, an MLP that learns it, and measures of a student."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.training.method import Distillation
from rcm.trigflow import Network, denoise, flow_map, interpolate, network_time
from tests.rcm.analytic_networks import GaussianMixture

TIMES = (0.3, 0.6, 0.9, 1.2, 1.5)
STEPS = (1, 2, 4)


def mixture() -> GaussianMixture:
    """Two of the modes are close, one is light; mean 0 and standard deviation 1, which is σd."""
    means = torch.tensor(
        [[-1.3, 0.9], [-0.5, 1.1], [1.2, 0.7], [0.9, -1.0], [-0.9, -1.2]], dtype=torch.float64
    )
    weights = torch.tensor([0.25, 0.2, 0.3, 0.2, 0.05], dtype=torch.float64)
    means = means - weights @ means
    std = 0.18
    scale = math.sqrt((weights @ means.square()).mean() + std**2)
    return GaussianMixture(means / scale, weights, std / scale)


class PlaneNetwork(nn.Module):
    """F(x, t, end) of points in the plane. It ignores `end` until it is trained with one."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.end = nn.Linear(4, width)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        h = self.first(torch.cat([x, _waves(t)], dim=1))
        if end is not None:
            h = h + self.end(_waves(t - end))
        return self.last(self.rest(h))


def _waves(t: Tensor) -> Tensor:
    return torch.stack([torch.sin(t), torch.cos(t), torch.sin(4 * t), torch.cos(4 * t)], dim=1)


class ExactTeacher(nn.Module):
    """The mixture's velocity as a module."""

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        return mixture().velocity(x, t)
