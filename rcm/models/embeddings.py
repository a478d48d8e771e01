"""Embeddings of times.

The losses contain dF/dt, and a frequency ω in an embedding multiplies dF/dt by ω. Fourier features
with frequencies in the hundreds are harmless in a teacher, but they make dF/dt explode (sCM,
2410.11081 §4.1).
"""

import math

import torch
from torch import Tensor, nn

from rcm.trigflow import require_precise_time

MAX_FREQUENCY = 16.0


class TimeEmbedding(nn.Module):
    """Sinusoids of t with frequencies from 1 to MAX_FREQUENCY, then a small MLP."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.logspace(0, math.log10(MAX_FREQUENCY), dim // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        require_precise_time(t)
        angle = t[:, None] * self.frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))

    def zero_output(self) -> None:
        """Make the embedding zero; its last layer still gets a gradient."""
        for parameter in self.mlp[-1].parameters():
            nn.init.zeros_(parameter)
