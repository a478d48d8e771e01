"""Cosmos-Predict2, text to image (0.6B, 2B, 14B).

Cosmos2TextToImagePipeline keeps x_σ = x0 + σ ε, and with u = σ/(1 + σ) computes

    x̂0 = c_skip x_σ + c_out model(c_in x_σ, u),    c_in = c_skip = 1 - u,  c_out = -u

As (1 - u) x_σ = (1 - u) x0 + u ε, this is a rectified-flow network with the time u.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rcm.models.adapter import Adapter, Condition, ConditionSpec, SampleSpec, Settings

VIDEO_FPS = 16  # the default of Cosmos2VideoToWorldPipeline; the positions of an image have none


def _predict(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # The pipeline says with zeros that no pixel is padding.
    config: Any = model.config
    mask = x.new_zeros(len(x), 1, *x.shape[2:]) if config["concat_padding_mask"] else None
    with _padding_mask_given(model):
        (prediction,) = model(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=condition["prompt_embeds"],
            fps=None if x.shape[2] == 1 else VIDEO_FPS,
            condition_mask=mask,
            return_dict=False,
        )
    return prediction


@contextmanager
def _padding_mask_given(model: nn.Module) -> Iterator[None]:
    """Inside, the model takes the channel of the padding mask as its `condition_mask`.

    Both are concatenated to the samples, in this order. The model resizes a `padding_mask` with
    torchvision, and the config decides whether it does.
    """
    config: Any = model.config
    given = type(config)({**config, "concat_padding_mask": False})
    model._internal_dict = given
    try:
        yield
    finally:
        model._internal_dict = config


def _sample(settings: Settings) -> SampleSpec:
    patch, most = tuple(settings["patch_size"]), tuple(settings["max_size"])
    return SampleSpec(channels=settings["out_channels"], patch=patch, max_size=most)


def _conditions(settings: Settings) -> dict[str, ConditionSpec]:
    return {"prompt_embeds": ConditionSpec(shape=("text", settings["text_embed_dim"]))}


def _require_supported(settings: Settings) -> None:
    other = {
        "extra_pos_embed_type": "Cosmos 1",
        "img_context_dim_in": "Cosmos-Transfer2.5",
        "use_crossattn_projection": "Cosmos-Predict2.5",
    }
    found = next((f"{key} of {model}" for key, model in other.items() if settings.get(key)), None)
    if settings["in_channels"] != settings["out_channels"]:
        found = "in_channels above out_channels, those of a video-to-world model,"
    if found:
        raise NotImplementedError(
            f"{found} is not supported; use a text-to-image model of Cosmos-Predict2"
        )


COSMOS = Adapter(
    class_name="CosmosTransformer3DModel",
    time_scale=1.0,
    predict=_predict,
    sample=_sample,
    conditions=_conditions,
    blocks=("transformer_blocks",),
    require_supported=_require_supported,
)
