"""Small unmodified transformers of diffusers with random weights, as TrigFlow networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rcm.network_conversions import from_rectified_flow
from rcm.trigflow import Network

CHANNELS, FRAMES, SIZE, TEXT, TEXT_DIM = 4, 2, 6, 5, 16


def wan(seed: int = 0) -> nn.Module:
    """Two blocks; dimensions that two ranks divide, and some that they do not."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return _without_zeros(
        WanTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=8,
            ffn_dim=33,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )


def cosmos(seed: int = 0) -> nn.Module:
    """As in Cosmos-Predict2."""
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(seed)
    return _without_zeros(
        CosmosTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=TEXT_DIM,
            adaln_lora_dim=4,
            max_size=(4, SIZE, SIZE),
            concat_padding_mask=False,
            extra_pos_embed_type=None,
        )
    )


def sd3(seed: int = 0) -> nn.Module:
    """As in Stable Diffusion 3.5."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return _without_zeros(
        SD3Transformer2DModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=TEXT_DIM,
            out_channels=CHANNELS,
            pos_embed_max_size=SIZE,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )


def _without_zeros(model: nn.Module) -> nn.Module:
    """A layer that starts at zero would hide the layers before it."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return model


def _call_video(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, **fixed: Any) -> Tensor:
    return model(x, t, text, return_dict=False, **fixed)[0]


def _call_cosmos(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return _call_video(model, x, t, text, fps=16)


def _call_sd3(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x[:, :, 0], text, text.mean(1), t, return_dict=False)[0][:, :, None]


CALLS: dict[Callable[..., nn.Module], Callable[..., Tensor]] = {
    wan: _call_video,
    cosmos: _call_cosmos,
    sd3: _call_sd3,
}


def raw_network(build: Callable[..., nn.Module], model: nn.Module, dtype: torch.dtype) -> Network:
    """net(x, 1000 u, text) -> ε - x0, computed in dtype, but for the time."""

    def network(x: Tensor, t: Tensor, text: Tensor, end: Tensor | None = None) -> Tensor:
        return CALLS[build](model, x.to(dtype), t.float(), text.to(dtype)).float()

    return network


def trigflow_network(model: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
    """The F of a Wan transformer."""
    return from_rectified_flow(raw_network(wan, model, dtype), time_scale=1000.0)


def data(batch: int) -> dict[str, Tensor]:
    """x0 and noise (batch, ...), times (batch,) float64, and a text."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    latent = (CHANNELS, FRAMES, SIZE, SIZE)
    return {
        "x0": randn(*latent),
        "noise": randn(*latent),
        "t": 0.2 + 1.2 * torch.rand(batch, generator=generator, dtype=torch.float64),
        "condition": randn(TEXT, TEXT_DIM),
    }
