"""Conversions between TrigFlow's t and the time variables of other papers.

TrigFlow, EDM and rectified flow are one path up to a scale. They differ in how they name a noise
level:

    TrigFlow        cos(t) x0/σd + sin(t) z   t in [0, π/2]
    EDM             x0 + σ ε                  σ = σd tan(t)
    rectified flow  (1 - u) x0 + u ε          u = σd sin(t) / (cos(t) + σd sin(t))

A conversion keeps the signal-to-noise ratio. σd is the standard deviation of the data.
"""

import torch
from torch import Tensor


def sigma_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """EDM noise level σ = σd tan(t) of x0 + σ ε, the same path up to the scale cos(t)."""
    return sigma_data * torch.tan(t)


def t_from_sigma(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, t = atan(σ / σd); σ = inf is π/2."""
    return torch.atan(sigma / sigma_data)


def t_from_signal_noise(signal: Tensor, noise: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of the same signal-to-noise ratio as a·x0 + s·ε, ε ~ N(0, 1), x0 in data units."""
    return torch.atan2(noise, sigma_data * signal)


def t_from_u(u: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of rectified flow's u in [0, 1], whose path is (1 - u) x0 + u ε."""
    return t_from_signal_noise(1 - u, u, sigma_data)


def u_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, u = σd sin(t) / (cos(t) + σd sin(t))."""
    noise = sigma_data * torch.sin(t)
    return noise / (torch.cos(t) + noise)
