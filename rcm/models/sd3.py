"""Stable Diffusion 3 and 3.5, as StableDiffusion3Pipeline calls them.

The embedding of an empty text is the usual negative prompt.
"""

from torch import Tensor, nn

from rcm.models.adapter import Adapter, Condition, ConditionSpec, SampleSpec, Settings


def _predict(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    (prediction,) = model(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_prompt_embeds"],
        return_dict=False,
    )
    return prediction


def _sample(settings: Settings) -> SampleSpec:
    patch = settings["patch_size"]
    most = settings["pos_embed_max_size"] * patch
    channels = settings["out_channels"] or settings["in_channels"]
    return SampleSpec(channels=channels, patch=(patch, patch), max_size=(most, most))


def _conditions(settings: Settings) -> dict[str, ConditionSpec]:
    return {
        "prompt_embeds": ConditionSpec(shape=("text", settings["joint_attention_dim"])),
        "pooled_prompt_embeds": ConditionSpec(shape=(settings["pooled_projection_dim"],)),
    }


SD3 = Adapter(
    class_name="SD3Transformer2DModel",
    time_scale=1000.0,
    predict=_predict,
    sample=_sample,
    conditions=_conditions,
    blocks=("transformer_blocks",),
)
