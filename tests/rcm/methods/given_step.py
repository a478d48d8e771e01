"""One iteration of a method on given data, noise and times, and a network with a known gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rcm.data.dataset import Dataset
from rcm.time_pairs import TimePairDistribution
from rcm.time_sampling import TimeDistribution
from rcm.training.batches import Batches
from rcm.training.method import Step
from rcm.trigflow import Network


class GivenStep(Step):
    """A step in the dtype of its data. Draws that are not given come from a generator.

    x0: (batch, ...); noise: the tensors that noise() returns first, like x0; t, end: (batch,), what
    times() and time_pairs() return.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        x0: Tensor,
        noise: tuple[Tensor, ...],
        t: Tensor,
        end: Tensor,
        *,
        iteration: int,
    ) -> None:
        labels = torch.zeros(len(x0), dtype=torch.int64)
        batches = Batches(Dataset(x0, labels, 1), len(x0), seed=0)
        updates = dict.fromkeys(networks, iteration)
        super().__init__(iteration, batches, networks, updates)  # type: ignore[arg-type]
        self.x0, self.t, self.end, self.given = x0, t, end, iter(noise)

    def noise(self) -> Tensor:
        drawn = torch.randn(self.x0.shape, generator=self.generator, dtype=self.x0.dtype)
        return next(self.given, drawn)

    def times(self, distribution: TimeDistribution) -> Tensor:
        return self.t

    def time_pairs(self, distribution: TimePairDistribution) -> tuple[Tensor, Tensor]:
        return self.t, self.end


class Perturbed(nn.Module):
    """F plus a combination of smooth functions of (x, t, end); the weights are its parameter."""

    def __init__(self, network: Network, weight: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.weights = nn.Parameter(torch.full((6,), weight, dtype=torch.float64))

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        time = t.view(-1, 1)
        gap = time if end is None else time - end.view(-1, 1)
        one = torch.ones_like(x)
        functions = (one, x, x.square(), torch.sin(time) * one, torch.cos(gap) * x, gap * one)
        return self.network(x, t, condition, end=end) + torch.stack(functions, -1) @ self.weights


def antithetic(
    x0: Tensor, noise: Tensor, t: Tensor, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """(x0, noise) followed by the pairs that are as probable and have the same x at t.

    x0 ~ N(mean, std²) and noise: (batch, elements); t: (batch,) -> (2 batch, elements) each. Given
    x, the mean of any function that is odd about the conditional mean vanishes on each two.
    """
    unit = (x0 - mean) / std
    along, across = std * torch.cos(t)[:, None], torch.sin(t)[:, None]
    part = 2 * (unit * across - noise * along) / (along**2 + across**2)
    reflected = unit - part * across, noise + part * along
    return torch.cat([x0, mean + std * reflected[0]]), torch.cat([noise, reflected[1]])
