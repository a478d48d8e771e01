"""Networks with closed-form outputs, and a smooth MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcm.trigflow import cos_sin


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std²) per element, in units of σd, with closed-form velocity and ODE."""

    mean: float = 0.7
    std: float = 0.4

    def spread(self, t: Tensor, x: Tensor) -> Tensor:
        """Standard deviation of x at t."""
        cos, sin = cos_sin(t, x)
        return torch.sqrt((cos * self.std) ** 2 + sin**2)

    def velocity(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """The exact teacher: F = cos E[z|x] - sin E[x0|x]."""
        cos, sin = cos_sin(t, x)
        centred = (x - cos * self.mean) / self.spread(t, x) ** 2
        return cos * sin * centred - sin * (self.mean + cos * self.std**2 * centred)

    def ode_end(self, x: Tensor, t: Tensor) -> Tensor:
        """End of the ODE through (x, t): the exact consistency function."""
        cos, _ = cos_sin(t, x)
        return self.mean + self.std * (x - cos * self.mean) / self.spread(t, x)

    def consistency(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """F of the exact student."""
        cos, sin = cos_sin(t, x)
        return (cos * x - self.ode_end(x, t)) / sin


class SmoothNetwork(nn.Module):
    """An MLP in (x, t) with smooth activations and optional dropout."""

    def __init__(self, features: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(features + 2, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, features)

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        h = torch.cat([x.flatten(1), torch.cos(t)[:, None], torch.sin(t)[:, None]], dim=1)
        h = self.dropout(torch.tanh(self.second(torch.tanh(self.first(h)))))
        return self.last(h).view(x.shape)
