"""Embeddings of times and of the guidance, and the learned weight w(t).

The losses contain dF/dt, and a frequency ω in an embedding multiplies dF/dt by ω. Positional
features have low frequencies. Fourier features have frequencies in the hundreds: harmless in a
teacher, but they make dF/dt explode (sCM, 2410.11081 §4.1).
"""

import math

import torch
from torch import Tensor, nn

from rcm.trigflow import require_precise_time

MAX_FREQUENCY = 16.0
FOURIER_SCALE = 16.0


class Sinusoids(nn.Module):
    """cos(ωt) and sin(ωt) for fixed frequencies ω: t (batch,) -> (batch, 2 * len(ω))."""

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies, persistent=saved)

    def forward(self, t: Tensor) -> Tensor:
        require_precise_time(t)
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def positional_features(dim: int) -> Sinusoids:
    """Frequencies from 1 to MAX_FREQUENCY."""
    frequencies = torch.logspace(0, math.log10(MAX_FREQUENCY), dim // 2)
    return Sinusoids(frequencies, saved=False)


def fourier_features(dim: int) -> Sinusoids:
    """Frequencies 2π N(0, FOURIER_SCALE²) as in EDM, saved with the weights as they are random."""
    frequencies = 2 * math.pi * FOURIER_SCALE * torch.randn(dim // 2)
    return Sinusoids(frequencies, saved=True)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, then a small MLP: (batch,) -> (batch, dim), zero if asked for."""

    def __init__(self, dim: int, *, zero: bool = False) -> None:
        super().__init__()
        self.features = positional_features(dim)
        self.mlp = _mlp(dim, dim, zero=zero)

    def forward(self, t: Tensor) -> Tensor:
        return _apply(self.mlp, self.features(t))


class GuidanceEmbedding(nn.Module):
    """Embedding of a guidance scale w and its interval [low, high]: (batch,) each -> (batch, dim).

    The network receives 1 - 1/w, which is 0 without guidance and below 1 for any scale (iMF,
    2512.02012). The embedding starts at zero. Raises ValueError unless all scales are positive.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = positional_features(dim)
        self.mlp = _mlp(3 * dim, dim, zero=True)

    def forward(self, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if not bool((scale > 0).all()):
            raise ValueError(
                f"the guidance scale is {scale.min().item():g}; as an input it must be positive"
            )
        inputs = (1 - 1 / scale, low, high)
        return _apply(self.mlp, torch.cat([self.features(value) for value in inputs], dim=1))


class LogWeight(nn.Module):
    """The adaptive weight w(t) of sCM (2410.11081 §4.2), initially 0: t (batch,) -> (batch,)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = positional_features(dim)
        self.linear = zero_init(nn.Linear(dim, 1))

    def forward(self, t: Tensor) -> Tensor:
        return _apply(self.linear, self.features(t))[:, 0]


def zero_init(linear: nn.Linear) -> nn.Linear:
    """Set a layer to zero, so that what it adds starts without effect."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _mlp(features: int, dim: int, *, zero: bool) -> nn.Sequential:
    first, last = nn.Linear(features, dim), nn.Linear(dim, dim)
    return nn.Sequential(first, nn.SiLU(), zero_init(last) if zero else last)


def _apply(module: nn.Module, features: Tensor) -> Tensor:
    """Sinusoids are computed in the dtype of the time, layers in that of their weights."""
    return module(features.to(next(module.parameters()).dtype))
