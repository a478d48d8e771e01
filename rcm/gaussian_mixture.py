"""A mixture of Gaussians: data whose velocity is known exactly, as a teacher without training.

`GaussianMixture.velocity` is a TrigFlow network. It serves to test methods and to see which modes
of the data a student keeps, in seconds and in any number of dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rcm.trigflow import cos_sin


@dataclass(frozen=True)
class GaussianMixture:
    """Data from a mixture of N(means[k], std²), in units of σd: means (modes, features).

    weights: (modes,), which sum to 1. Tensors are float64; results have the dtype of x.
    """

    means: Tensor
    weights: Tensor
    std: float

    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Samples (count, features) float64 and their modes (count,)."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[mode] + self.std * noise, mode

    def velocity(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        """The exact teacher: the velocities of all modes, weighted by their posterior given x."""
        cos, sin = cos_sin(t, x)
        variance = (cos * self.std) ** 2 + sin**2
        centred = x[:, None] - (cos * self.means.to(x.dtype).flatten()).unflatten(
            1, (-1, x.shape[1])
        )
        posterior = torch.softmax(
            self.weights.to(x.dtype).log() - centred.square().sum(2) / (2 * variance), dim=1
        )
        mean = posterior @ self.means.to(x.dtype)
        distance = (posterior[..., None] * centred).sum(1)
        return cos * sin * (1 - self.std**2) / variance * distance - sin * mean

    def ode_point(self, x: Tensor, t: Tensor, end: Tensor, steps: int = 100) -> Tensor:
        """The point at `end` of the ODE through (x, t), by Runge-Kutta's fourth-order method."""
        dt = ((end - t) / steps).to(x.dtype)
        for step in range(steps):
            time = t + step * dt
            h = dt[:, None]
            k1 = self.velocity(x, time)
            k2 = self.velocity(x + h / 2 * k1, time + dt / 2)
            k3 = self.velocity(x + h / 2 * k2, time + dt / 2)
            k4 = self.velocity(x + h * k3, time + dt)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def nearest_mode(self, x: Tensor) -> Tensor:
        """The mode whose mean is nearest: (batch, features) -> (batch,)."""
        return torch.cdist(x.double(), self.means).argmin(1)
