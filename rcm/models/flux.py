"""FLUX.1 (dev, schnell), as FluxPipeline calls it.

Samples are latents (batch, 16, height, width). The model takes packed ones, with 2×2 patches as
channels. FLUX.1-dev takes the scale of the guidance that is distilled into it as an input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from rcm.models.adapter import Adapter, Condition, ConditionSpec, SampleSpec, Settings

PATCH = 2
GUIDANCE = 3.5  # the default of FluxPipeline
SCALE = 1000.0


def _predict(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    text = condition["prompt_embeds"]
    height, width = (size // PATCH for size in x.shape[2:])
    config: Any = model.config
    guidance = torch.full_like(time, GUIDANCE) if config["guidance_embeds"] else None
    embedded = (time,) if guidance is None else (time, SCALE * guidance)
    with _embedding_of(model.get_submodule("time_text_embed"), embedded):
        (prediction,) = model(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH),
            timestep=torch.zeros_like(time),  # unused
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=condition["pooled_prompt_embeds"],
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=_positions(height, width, x.device),
            return_dict=False,
        )
    pattern = "b (h w) (c p q) -> b c (h p) (w q)"
    return rearrange(prediction, pattern, h=height, p=PATCH, q=PATCH)


@contextmanager
def _embedding_of(embedding: nn.Module, times: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, these are the first arguments of the embedding, whatever the model passes.

    The model casts its time and guidance to the dtype of the samples, which may be bfloat16.
    """
    handle = embedding.register_forward_pre_hook(lambda _, args: (*times, *args[len(times) :]))
    try:
        yield
    finally:
        handle.remove()


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """Position (0, row, column) of each token: (height * width, 3)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows.float(), columns.float())


def _sample(settings: Settings) -> SampleSpec:
    channels = (settings["out_channels"] or settings["in_channels"]) // PATCH**2
    return SampleSpec(channels=channels, patch=(PATCH, PATCH))


def _conditions(settings: Settings) -> dict[str, ConditionSpec]:
    return {
        "prompt_embeds": ConditionSpec(shape=("text", settings["joint_attention_dim"])),
        "pooled_prompt_embeds": ConditionSpec(shape=(settings["pooled_projection_dim"],)),
    }


def _require_supported(settings: Settings) -> None:
    if settings["out_channels"] not in (None, settings["in_channels"]):
        raise NotImplementedError(
            "FLUX with in_channels above out_channels takes an image, which is not supported; use "
            "a text-to-image model"
        )


FLUX = Adapter(
    class_name="FluxTransformer2DModel",
    time_scale=SCALE,
    predict=_predict,
    sample=_sample,
    conditions=_conditions,
    blocks=("transformer_blocks", "single_transformer_blocks"),
    require_supported=_require_supported,
)
