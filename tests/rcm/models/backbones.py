"""Tiny transformers of diffusers as TrigFlow networks, and inputs for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rcm.models.backbone import Backbone
from rcm.models.diffusers import Architecture
from rcm.presets.tiny import SAMPLE_SHAPES, perturb, tiny, tiny_condition

ARCHITECTURES = tuple(SAMPLE_SHAPES)
BATCH = 2


def tiny_backbone(
    architecture: Architecture, *, heads: int = 4, seed: int = 0, **settings: Any
) -> Backbone:
    """A network without zeros or ones in its weights; settings replace those of the tiny config."""
    torch.manual_seed(seed)
    config = tiny(architecture, heads=heads)
    network = replace(config, settings={**config.settings, **settings}).build()
    perturb(network)
    return network


def example(architecture: Architecture) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and condition of two samples, in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *SAMPLE_SHAPES[architecture], generator=generator)
    condition = tiny_condition(architecture, BATCH, generator)
    return x, torch.tensor([0.4, 1.2]), condition
