"""The recorded arrays, and the network that produced them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rcm.guidance import guided
from rcm.network_conversions import from_rectified_flow
from rcm.trigflow import Network

with np.load(Path(__file__).with_name("rcm_losses.npz"), allow_pickle=False) as arrays:
    ORACLE = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

CONDITION, UNCONDITION = ORACLE["condition"], ORACLE["uncondition"]
GUIDANCE = 5.0


class StandIn(nn.Module):
    """A rectified-flow network of (x, 1000 u): two layers, the condition added to the first."""

    def __init__(self, role: str) -> None:
        super().__init__()
        names = [f"net_{role}_{name}" for name in ("W1", "b1", "W2", "b2")]
        self.weights = nn.ParameterList(ORACLE[name].clone() for name in names)
        self.register_buffer("frequencies", ORACLE["net_w"].clone())

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.weights
        phase = self.frequencies * time[:, None]
        h = torch.cat([x.flatten(1), torch.sin(phase), torch.cos(phase)], dim=1)
        return (torch.tanh(h @ w1.T + b1 + condition) @ w2.T + b2).view(x.shape)

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of a sum over the batch with respect to all weights, concatenated."""
        gradients = torch.autograd.grad(loss.sum(), list(self.weights))
        return torch.cat([gradient.flatten() for gradient in gradients])


def trigflow(network: nn.Module) -> Network:
    return from_rectified_flow(network, time_scale=1000)


def with_guidance(network: Network) -> Network:
    return guided(network, lambda condition: UNCONDITION.to(condition), GUIDANCE)


def assert_recorded(name: str, value: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to tolerance times the largest magnitude of the array, or 1 if that is less."""
    recorded = ORACLE[name].reshape(value.shape)
    atol = tolerance * max(1.0, recorded.abs().max().item())
    value = value.detach().to(recorded.dtype)
    torch.testing.assert_close(value, recorded, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")
