"""One iteration of a method on given data, noise and times, and a network with a known gradient."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rcm.data.dataset import Dataset
from rcm.time_pairs import TimePairDistribution
from rcm.time_sampling import TimeDistribution
from rcm.training.batches import Batches
from rcm.training.method import Step
from rcm.trigflow import Network
from tests.rcm.analytic_networks import Gaussian


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
        batches = Batches(Dataset(x0, labels, 1), len(x0), 0, x0.device)
        batch = replace(batches.read(iteration, range(len(x0))), x0=x0)
        updates = dict.fromkeys(networks, iteration)
        super().__init__(iteration, batch, networks, updates)  # type: ignore[arg-type]
        self.t, self.end, self.given = t, end, iter(noise)

    def noise(self) -> Tensor:
        return next(self.given, super().noise())

    def times(self, distribution: TimeDistribution) -> Tensor:
        return self.t

    def time_pairs(self, distribution: TimePairDistribution) -> tuple[Tensor, Tensor]:
        return self.t, self.end


class Perturbed(nn.Module):
    """F plus a sum of smooth functions of (x, t, end), whose weights are trained.

    The first function is constant. The other weights are zero at first.
    """

    def __init__(self, network: Network, constant: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.weights = nn.Parameter(torch.tensor([constant, 0, 0, 0, 0, 0], dtype=torch.float64))

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        time = t.view(-1, 1)
        gap = time if end is None else time - end.view(-1, 1)
        one = torch.ones_like(x)
        functions = (one, x, x.square(), torch.sin(time) * one, torch.cos(gap) * x, gap * one)
        return self.network(x, t, condition, end=end) + torch.stack(functions, -1) @ self.weights


def antithetic(x0: Tensor, noise: Tensor, t: Tensor, data: Gaussian) -> tuple[Tensor, Tensor]:
    """Each x0 and noise, then the pair that is as probable and leads to the same x at t.

    x0, noise: (batch, elements); t: (batch,) -> (2 batch, elements) each. The means of x0 and of
    noise over the two are the conditional means given x, around which both are symmetric.
    """
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    x = cos * x0 + sin * noise
    centred = (x - cos * data.mean) / ((cos * data.std) ** 2 + sin**2)
    mean_x0, mean_noise = data.mean + cos * data.std**2 * centred, sin * centred
    return torch.cat([x0, 2 * mean_x0 - x0]), torch.cat([noise, 2 * mean_noise - noise])
