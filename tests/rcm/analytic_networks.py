"""Data with closed-form velocities and flow maps, a smooth MLP, and its training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcm.losses.loss import Loss
from rcm.sampling import flow_map_sample, heun_times
from rcm.trigflow import Network, cos_sin


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std²) per element, in units of σd, with closed-form velocity and ODE."""

    mean: float = 0.7
    std: float = 0.4

    def spread(self, t: Tensor, x: Tensor) -> Tensor:
        """Standard deviation of x at t."""
        cos, sin = cos_sin(t, x)
        return torch.sqrt((cos * self.std) ** 2 + sin**2)

    def velocity(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        """The exact teacher: F = cos E[z|x] - sin E[x0|x], whatever the end."""
        cos, sin = cos_sin(t, x)
        centred = (x - cos * self.mean) / self.spread(t, x) ** 2
        return cos * sin * centred - sin * (self.mean + cos * self.std**2 * centred)

    def ode_point(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """The point at `end` of the ODE through (x, t): the exact flow map."""
        (cos, _), (cos_end, _) = cos_sin(t, x), cos_sin(end, x)
        growth = self.spread(end, x) / self.spread(t, x)
        return cos_end * self.mean + growth * (x - cos * self.mean)

    def ode_end(self, x: Tensor, t: Tensor) -> Tensor:
        """End of the ODE through (x, t): the exact consistency function."""
        return self.ode_point(x, t, torch.zeros_like(t))

    def flow_map_network(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        """F = (cos(t - s) x - ode_point) / sin(t - s), s = end; None is s = 0.

        The division is carried out symbolically, so that s = t gives the velocity.
        """
        end = torch.zeros_like(t) if end is None else end
        cos, sin = cos_sin(t, x)
        _, sin_sum = cos_sin(t + end, x)
        tan_half_gap = torch.tan((t - end) / 2).to(cos.dtype).view(cos.shape)
        spread = self.spread(t, x)
        growth = self.spread(end, x) / spread
        slope = (1 - self.std**2) * sin_sum / (spread**2 * (1 + growth)) - tan_half_gap
        return slope * (x - cos * self.mean) - sin * self.mean

    def consistency(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        """F of the exact consistency function, whatever the end."""
        return self.flow_map_network(x, t)


class SmoothNetwork(nn.Module):
    """An MLP in (x, t) with smooth activations and optional dropout.

    `end` adds a fixed linear map of cos(t - end), sin(t - end) to the first hidden layer.
    """

    angles: Tensor

    def __init__(self, features: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(features + 2, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, features)
        self.register_buffer("angles", torch.linspace(0, 2 * torch.pi, width))

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        h = torch.cat([x.flatten(1), torch.cos(t)[:, None], torch.sin(t)[:, None]], dim=1)
        h = self.first(h)
        if end is not None:
            h = h + torch.cos(self.angles - (t - end)[:, None])
        h = self.dropout(torch.tanh(self.second(torch.tanh(h))))
        return self.last(h).view(x.shape)


def train(
    net: nn.Module, steps: int, loss_of_step: Callable[[int], Loss], lr: float = 4e-3
) -> None:
    """Adam with a learning rate that falls to 0, and clipped gradients."""
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of_step(step).value.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def flow_map_errors(
    net: Network, gaussian: Gaussian, generator: torch.Generator
) -> dict[int, float]:
    """RMS distance of 2000 samples from the ends of the ODE, by the number of steps: 1, 2, 4."""
    noise, t = torch.randn(2000, 1, generator=generator), torch.full((2000,), torch.pi / 2)
    ends = gaussian.ode_end(noise, t)
    samples = {steps: flow_map_sample(net, noise, heun_times(steps), None) for steps in (1, 2, 4)}
    return {steps: (x - ends).square().mean().sqrt().item() for steps, x in samples.items()}
