"""Small DiTs with each option, and inputs for them."""

from typing import Any

import torch
from torch import Tensor, nn

from rcm.models.dit import DiT

OPTIONS: dict[str, dict[str, Any]] = {
    "double_norm": {"double_norm": True},
    "fourier": {"time_embedding": "fourier"},
    "learned_weight": {"learned_weight": True},
    "null_class": {"null_class": True},
    "guidance_input": {"guidance_input": True},
    "auxiliary_head": {"auxiliary_head": True},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


def small_dit(**options: Any) -> DiT:
    """A DiT with two narrow blocks, in float64; its weights depend only on the options."""
    torch.manual_seed(0)
    return DiT(**{"dim": 16, "depth": 2, "heads": 2, **options}).double()


def randomised(**options: Any) -> DiT:
    """A small DiT with random weights instead of its initial zeros."""
    net = small_dit(**options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, labels and an end below t, in float64."""
    x, t = torch.randn(3, 1, 8, 8).double(), torch.rand(3).double()
    return x, t, torch.tensor([0, 5, 9]), torch.rand(3) * t
