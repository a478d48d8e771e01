"""Wan: Wan2.1 text-to-video (1.3B, 14B) and image-to-video (14B), Wan2.2 text-to-video (5B).

The conventions are those of WanPipeline and WanImageToVideoPipeline. Each of the two networks of
Wan2.2's 14B models works too, on the times that it was trained for. The 5B model is a
text-to-video model here: its image-to-video gives the first frame a time of its own.
"""

import torch
from torch import Tensor, nn

from rcm.models.adapter import Adapter, Condition, ConditionSpec, SampleSpec, Settings

IMAGE_TO_VIDEO_TEXT = 512  # diffusers takes the last 512 tokens for text, the others for the image


def _predict(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    image = condition.get("image_latents")
    (prediction,) = model(
        hidden_states=x if image is None else torch.cat([x, image], dim=1),
        timestep=time,
        encoder_hidden_states=condition["prompt_embeds"],
        encoder_hidden_states_image=condition.get("image_embeds"),
        return_dict=False,
    )
    return prediction


def _sample(settings: Settings) -> SampleSpec:
    patch = tuple(settings["patch_size"])
    most = settings["rope_max_seq_len"]
    channels = settings["out_channels"] or settings["in_channels"]
    return SampleSpec(channels=channels, patch=patch, max_size=tuple(most * p for p in patch))


def _conditions(settings: Settings) -> dict[str, ConditionSpec]:
    has_image = settings["image_dim"] is not None
    length = IMAGE_TO_VIDEO_TEXT if has_image else "text"
    conditions = {"prompt_embeds": ConditionSpec(shape=(length, settings["text_dim"]))}
    # The mask of the given frames, then the encoded video that has only these frames.
    extra = settings["in_channels"] - _sample(settings).channels
    if extra:
        conditions["image_latents"] = ConditionSpec(
            shape=(extra, "frames", "height", "width"), guided=False
        )
    if has_image:  # Wan2.1, by CLIP
        conditions["image_embeds"] = ConditionSpec(
            shape=("image", settings["image_dim"]), guided=False
        )
    return conditions


def _require_supported(settings: Settings) -> None:
    if settings.get("pos_embed_seq_len") is not None:
        raise NotImplementedError(
            "Wan with pos_embed_seq_len takes a first and a last frame, which is not supported; "
            "use a text-to-video or an image-to-video model"
        )


WAN = Adapter(
    class_name="WanTransformer3DModel",
    time_scale=1000.0,
    predict=_predict,
    sample=_sample,
    conditions=_conditions,
    blocks=("blocks",),
    require_supported=_require_supported,
)
