"""Tiny random models of the real classes of diffusers, to run everything on a CPU.

A sample has 45 tokens in a video and 15 in an image, and a text 7: numbers that 2 and 4 do not
divide. Their weights are random, and no weight is zero or one as in a new model (`perturb`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from rcm.models.diffusers import Architecture, DiffusersConfig

CHANNELS, TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 4, 7, 16, 8
VIDEO, IMAGE = (CHANNELS, 3, 6, 10), (CHANNELS, 6, 10)
SAMPLE_SHAPES: dict[Architecture, tuple[int, ...]] = {
    "wan": VIDEO,
    "cosmos": VIDEO,
    "sd3": IMAGE,
    "flux": IMAGE,
}


def tiny(architecture: Architecture, *, heads: int = 4, layers: int = 2) -> DiffusersConfig:
    """The config of a tiny model. Any number of heads works, such as 3."""
    settings = _SETTINGS[architecture](heads, layers)
    return DiffusersConfig(architecture=architecture, settings=settings)


def tiny_condition(
    architecture: Architecture, batch: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A random condition for a batch of samples."""
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (TEXT_LENGTH, TEXT_DIM)}
    if architecture in ("sd3", "flux"):
        shapes["pooled_prompt_embeds"] = (POOLED_DIM,)
    return {n: torch.randn(batch, *shape, generator=generator) for n, shape in shapes.items()}


def perturb(module: nn.Module, scale: float = 0.05) -> None:
    """Add noise to all weights, so that no zero or one of a new model hides an error."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def _wan(heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": layers,
        "rope_max_seq_len": 32,
    }


def _cosmos(heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_embed_dim": TEXT_DIM,
        "adaln_lora_dim": 8,
        "mlp_ratio": 1.0,
        "num_layers": layers,
        "max_size": (8, 16, 16),
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
    }


def _sd3(heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 8,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "sample_size": 16,
        "pos_embed_max_size": 8,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 8 * heads,
        "pooled_projection_dim": POOLED_DIM,
        "num_layers": layers,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }


def _flux(heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 8,
        "in_channels": 4 * CHANNELS,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "num_layers": 1,
        "num_single_layers": layers - 1,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 2, 2),
    }


_SETTINGS = {"wan": _wan, "cosmos": _cosmos, "sd3": _sd3, "flux": _flux}
