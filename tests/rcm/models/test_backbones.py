"""Transformers of diffusers as TrigFlow networks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jvp_attn
from rcm.models.backbone import Backbone
from rcm.models.diffusers import Architecture
from rcm.models.wan import WAN
from rcm.time_precision import require_unrounded_time
from tests.rcm.models.backbones import ARCHITECTURES, BATCH, example, tiny_backbone

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
SCALES = {"wan": 1000.0, "cosmos": 1.0, "sd3": 1000.0, "flux": 1000.0}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- F -----------------------------------------------------------------------------------------


@pytest.fixture
def torchvision_in_cosmos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of torchvision that Cosmos calls to resize its padding mask."""

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return F.interpolate(mask, size, mode=interpolation)

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    module = "diffusers.models.transformers.transformer_cosmos.transforms"
    monkeypatch.setattr(module, transforms, raising=False)


def denoised_by_wan(model: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """WanPipeline and a flow-matching scheduler: x̂0 = x_u - u v."""
    u = (t.sin() / (t.sin() + t.cos())).view(-1, *[1] * (x.ndim - 1))
    x_u = x * (1 - u) / t.cos().view(u.shape)
    (v,) = model(x_u, 1000 * u.flatten(), condition["prompt_embeds"], return_dict=False)
    return x_u - u * v


def denoised_by_cosmos(
    model: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    """The lines of Cosmos2TextToImagePipeline, with the fps of a video."""
    current_sigma = t.tan().view(-1, 1, 1, 1, 1)
    latents = x * (1 + current_sigma**2).sqrt()
    current_t = current_sigma / (current_sigma + 1)
    c_in, c_skip, c_out = 1 - current_t, 1 - current_t, -current_t
    noise_pred = model(
        hidden_states=latents * c_in,
        timestep=current_t.flatten(),
        encoder_hidden_states=condition["prompt_embeds"],
        fps=16,
        padding_mask=x.new_zeros(1, 1, 48, 80),
        return_dict=False,
    )[0]
    return c_skip * latents + c_out * noise_pred


def denoised_by_sd3(model: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """StableDiffusion3Pipeline, with its scheduler's step from σ to 0."""
    sigma = (t.sin() / (t.sin() + t.cos())).view(-1, 1, 1, 1)
    sample = x * (1 - sigma) / t.cos().view(sigma.shape)
    model_output = model(
        hidden_states=sample,
        timestep=1000 * sigma.flatten(),
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return sample + (0 - sigma) * model_output


def denoised_by_flux(
    model: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    """FluxPipeline, with its packing, its positions and its scheduler's step from σ to 0."""
    sigma = (t.sin() / (t.sin() + t.cos())).view(-1, 1, 1, 1)
    sample = x * (1 - sigma) / t.cos().view(sigma.shape)
    batch, channels, height, width = x.shape
    latents = sample.view(batch, channels, height // 2, 2, width // 2, 2)
    latents = latents.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 1] += torch.arange(height // 2)[:, None]
    ids[..., 2] += torch.arange(width // 2)[None, :]
    packed = model(
        hidden_states=latents,
        timestep=1000 * sigma.flatten() / 1000,
        guidance=torch.full([batch], 3.5),
        pooled_projections=condition["pooled_prompt_embeds"],
        encoder_hidden_states=condition["prompt_embeds"],
        txt_ids=torch.zeros(condition["prompt_embeds"].shape[1], 3),
        img_ids=ids.reshape(-1, 3),
        return_dict=False,
    )[0]
    packed = packed.view(batch, height // 2, width // 2, channels, 2, 2)
    return sample - sigma * packed.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


DENOISED = {
    "wan": denoised_by_wan,
    "cosmos": denoised_by_cosmos,
    "sd3": denoised_by_sd3,
    "flux": denoised_by_flux,
}


@every_architecture
@pytest.mark.usefixtures("torchvision_in_cosmos")
@pytest.mark.parametrize("heads", [4, 3])
def test_f_has_the_data_prediction_of_the_pipeline(architecture: Architecture, heads: int) -> None:
    """x̂0 = cos(t) x - sin(t) F."""
    net = tiny_backbone(architecture, heads=heads)
    x, t, condition = example(architecture)
    f = net(x, t, condition)
    assert f.dtype == torch.float32
    cos, sin = (v.view(-1, *[1] * (x.ndim - 1)) for v in (t.cos(), t.sin()))
    denoised = DENOISED[architecture](net.model, x, t, condition)
    torch.testing.assert_close(cos * x - sin * f, denoised, rtol=0, atol=2e-6)


@every_architecture
def test_the_jvp_is_the_derivative(architecture: Architecture) -> None:
    """Against a central difference in float32, whose error is about 1e-3."""
    net = tiny_backbone(architecture).requires_grad_(False)
    x, t, condition = example(architecture)
    tx, tt, step = torch.randn_like(x), torch.tensor([0.5, -0.7]), 1e-4
    _, tangent = torch.func.jvp(lambda x, t: net(x, t, condition), (x, t), (tx, tt))
    ahead, behind = (net(x + h * tx, t + h * tt, condition) for h in (step, -step))
    assert relative_error(tangent, (ahead - behind) / (2 * step)) < 0.01


@every_architecture
def test_attention_goes_to_the_attribute(architecture: Architecture) -> None:
    net = tiny_backbone(architecture)
    x, t, condition = example(architecture)
    expected, calls = net(x, t, condition), 0

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return jvp_attn.scaled_dot_product_attention(*args, **kwargs)

    net.attention = attention
    assert torch.equal(net(x, t, condition), expected)
    # Self-attention and cross-attention; joint attention, and that to the image in one block.
    assert calls == {"wan": 4, "cosmos": 4, "sd3": 3, "flux": 2}[architecture]


def test_an_image_of_cosmos_has_no_fps() -> None:
    net = tiny_backbone("cosmos")
    _, t, condition = example("cosmos")
    given = []
    net.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["fps"]), with_kwargs=True
    )
    for frames in (1, 2):
        net(torch.randn(BATCH, 4, frames, 6, 10), t, condition)
    assert given == [None, 16]


def test_cosmos_keeps_its_config() -> None:
    net = tiny_backbone("cosmos")
    x, t, condition = example("cosmos")
    net(x, t, condition)
    assert net.model.config["concat_padding_mask"] is True
    assert net.model.config.concat_padding_mask is True
    net.attention = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        net(x, t, condition)
    assert net.model.config["concat_padding_mask"] is True


def test_flux_without_guidance_input() -> None:
    net = tiny_backbone("flux", guidance_embeds=False)
    x, t, condition = example("flux")
    require_unrounded_time(net, x, t, condition)
    assert net(x, t, condition).shape == x.shape


# ---- the time ----------------------------------------------------------------------------------


def in_bfloat16(net: Backbone) -> Backbone:
    """With weights in bfloat16, as sharded training gathers them."""
    net.dtype = torch.bfloat16
    return net.bfloat16().requires_grad_(False)


@every_architecture
def test_the_time_is_exact_in_a_network_of_bfloat16(architecture: Architecture) -> None:
    net = in_bfloat16(tiny_backbone(architecture))
    x, t, condition = example(architecture)
    times = []
    for module in net.model.modules():
        if type(module).__name__ == "Timesteps":
            module.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    f = net(x, t, condition)
    assert f.dtype == torch.float32
    u = t.double().sin() / (t.double().sin() + t.double().cos())
    expected = [(SCALES[architecture] * u).float()]
    if architecture == "flux":
        expected.append(torch.full((BATCH,), 3500.0))  # the guidance has the same embedding
    assert len(times) == len(expected)
    for found, time in zip(times, expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, time)
    require_unrounded_time(net, x, t, condition)


@every_architecture
def test_bfloat16_is_near_float32(architecture: Architecture) -> None:
    net = tiny_backbone(architecture)
    x, t, condition = example(architecture)
    expected = net(x, t, condition)
    assert relative_error(in_bfloat16(net)(x, t, condition), expected) < 0.03


@every_architecture
def test_a_time_in_bfloat16_raises(architecture: Architecture) -> None:
    net = tiny_backbone(architecture)
    x, t, condition = example(architecture)
    with pytest.raises(ValueError, match=r"time has dtype torch.bfloat16"):
        net(x, t.bfloat16(), condition)


@pytest.mark.parametrize("architecture", ["wan", "cosmos", "sd3"])
def test_a_time_that_is_cast_on_the_way_to_the_model_raises(architecture: Architecture) -> None:
    """As FSDP2 does it by default."""
    net = tiny_backbone(architecture)
    net.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "timestep": kwargs["timestep"].bfloat16()}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match=r"time has dtype torch.bfloat16"):
        net(*example(architecture))


def test_the_second_time_of_a_flow_map_raises() -> None:
    x, t, condition = example("wan")
    with pytest.raises(NotImplementedError, match=r"has one time.*\(meanflow, imeanflow, ayf, tvm"):
        tiny_backbone("wan")(x, t, condition, end=t / 2)


# ---- conditions --------------------------------------------------------------------------------


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    condition = example("sd3")[2]
    return {**condition, name: change(condition[name])}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"prompt_embeds": torch.ones(2, 7, 16)}, "the condition has prompt_embeds; .* takes "),
        ({}, "the condition has no tensors; .* takes prompt_embeds, pooled_prompt_embeds"),
        (changed("prompt_embeds", lambda x: x[..., :5]), r"\(2, 7, 5\); .* takes \(2, any, 16\)"),
        (changed("prompt_embeds", lambda x: x[:1]), r"\(1, 7, 16\); .* takes \(2, any, 16\)"),
        (changed("pooled_prompt_embeds", lambda x: x[None]), r"\(1, 2, 8\); .* takes \(2, 8\)"),
    ],
)
def test_a_wrong_condition_raises(condition: dict[str, Tensor], message: str) -> None:
    x, t, _ = example("sd3")
    with pytest.raises(ValueError, match=message):
        tiny_backbone("sd3")(x, t, condition)


def test_a_condition_that_is_no_dict_raises() -> None:
    x, t, _ = example("sd3")
    with pytest.raises(TypeError, match=r"the condition is a Tensor; .* a dict of tensors: prompt"):
        tiny_backbone("sd3")(x, t, torch.tensor([1, 2]))  # type: ignore[arg-type]


# ---- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("wan", (5, 3, 6, 10)),
        ("wan", (4, 6, 10)),
        ("wan", (4, 3, 6, 9)),
        ("wan", (4, 33, 6, 10)),
        ("wan", (4, 0, 6, 10)),
        ("cosmos", (4, 3, 6, 18)),
        ("sd3", (4, 18, 10)),
        ("sd3", (4, 3, 6, 10)),
        ("flux", (16, 6, 10)),
        ("flux", (4, 6, 9)),
    ],
)
def test_a_sample_of_another_shape_raises(
    architecture: Architecture, shape: tuple[int, ...]
) -> None:
    net = tiny_backbone(architecture)
    _, t, condition = example(architecture)
    with pytest.raises(ValueError, match=r"samples have shape .*; .* with 4 channels and other si"):
        net(torch.randn(BATCH, *shape), t, condition)


def test_the_message_says_what_the_model_takes() -> None:
    expected = (
        r"samples have shape \(4, 5, 10\); SD3Transformer2DModel takes \(channels, height, width\) "
        r"with 4 channels and other sizes divisible by \(2, 2\), at most \(16, 16\)"
    )
    with pytest.raises(ValueError, match=expected):
        tiny_backbone("sd3").require_sample_shape((4, 5, 10))


# ---- uses of Wan -------------------------------------------------------------------------------


def image_to_video(**settings: Any) -> tuple[Backbone, Tensor, Tensor, dict[str, Tensor]]:
    net = tiny_backbone("wan", in_channels=9, image_dim=12, added_kv_proj_dim=48, **settings)
    x, t, _ = example("wan")
    condition = {
        "prompt_embeds": torch.randn(BATCH, 512, 16),
        "image_latents": torch.randn(BATCH, 5, *x.shape[2:]),
        "image_embeds": torch.randn(BATCH, 6, 12),
    }
    return net, x, t, condition


def test_image_to_video_is_that_of_the_pipeline() -> None:
    net, x, t, condition = image_to_video()
    cos, sin = t.double().cos(), t.double().sin()
    x_u = (x / (cos + sin).view(-1, 1, 1, 1, 1)).float()
    v = net.model(
        hidden_states=torch.cat([x_u, condition["image_latents"]], dim=1),
        timestep=(1000 * sin / (cos + sin)).float(),
        encoder_hidden_states=condition["prompt_embeds"],
        encoder_hidden_states_image=condition["image_embeds"],
        return_dict=False,
    )[0]
    cos, sin = cos.view(-1, 1, 1, 1, 1), sin.view(-1, 1, 1, 1, 1)
    expected = (((cos - sin) * x + v) / (cos + sin)).float()
    torch.testing.assert_close(net(x, t, condition), expected, rtol=0, atol=2e-6)


def test_the_unconditional_prediction_keeps_the_image() -> None:
    net, *_ = image_to_video()
    assert net.fixed_conditions == ("image_latents", "image_embeds")
    assert tiny_backbone("wan").fixed_conditions == ()


def test_an_image_to_video_condition_of_another_size_raises() -> None:
    """diffusers would take a part of a shorter text for the image."""
    net, x, t, condition = image_to_video()
    with pytest.raises(ValueError, match=r"prompt_embeds .* takes \(2, 512, 16\)"):
        net(x, t, {**condition, "prompt_embeds": condition["prompt_embeds"][:, 1:]})
    message = (
        r"image_latents has shape \(2, 5, 2, 6, 10\); WanTransformer3DModel takes "
        r"\(2, 5, 3, 6, 10\) for x of shape \(2, 4, 3, 6, 10\)"
    )
    with pytest.raises(ValueError, match=message):
        net(x, t, {**condition, "image_latents": condition["image_latents"][:, :, 1:]})
    with pytest.raises(ValueError, match=r"image_latents .* takes \(2, 5, 3, 6, 10\)"):
        net(x, t, {**condition, "image_latents": condition["image_latents"][..., 1:]})


def test_an_embedding_of_an_image_may_have_any_tokens() -> None:
    net, x, t, condition = image_to_video()
    embedding = condition["image_embeds"]
    assert net.condition_shapes["image_embeds"] == ("image", 12)
    net(x, t, {**condition, "image_embeds": torch.cat([embedding, embedding], dim=1)})
    with pytest.raises(ValueError, match=r"image_embeds .* takes \(2, any, 12\)"):
        net(x, t, {**condition, "image_embeds": embedding[..., 1:]})


def test_wan_2_2_has_image_latents_without_image_embeddings() -> None:
    net = tiny_backbone("wan", in_channels=9)
    assert net.condition_shapes == {
        "prompt_embeds": ("text", 16),
        "image_latents": (5, "frames", "height", "width"),
    }


def test_a_time_for_each_token_as_in_wan_2_2_5b_changes_nothing() -> None:
    """WanPipeline repeats the time of a sample for each of its tokens."""
    net = tiny_backbone("wan")
    x, _, condition = example("wan")
    time, text = torch.tensor([300.0, 900.0]), condition["prompt_embeds"]
    (of_sample,) = net.model(x, time, text, return_dict=False)
    (of_token,) = net.model(x, time[:, None].expand(-1, 45), text, return_dict=False)
    torch.testing.assert_close(of_sample, of_token, rtol=0, atol=2e-6)


# ---- the model ---------------------------------------------------------------------------------


@every_architecture
def test_all_blocks_are_checkpointed_and_change_nothing(architecture: Architecture) -> None:
    net = tiny_backbone(architecture)
    x, t, condition = example(architecture)
    expected = net(x, t, condition)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    called = []

    def checkpoint(block: nn.Module, *args: Any) -> Any:
        called.append(block)
        return jvp_attn.checkpoint_jvp(block, *args)

    net.enable_gradient_checkpointing(checkpoint)
    f = net(x, t, condition)
    f.square().sum().backward()
    assert called == [block for blocks in net.blocks for block in blocks]
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-6)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)


def test_it_has_no_learned_weight_and_no_second_output() -> None:
    net = tiny_backbone("wan")
    assert net.log_weight is None
    assert not hasattr(net, "heads")


def test_a_model_of_another_class_raises() -> None:
    with pytest.raises(TypeError, match=r"is a SD3Transformer2DModel; .* is for WanTransformer3DM"):
        Backbone(tiny_backbone("sd3").model, WAN)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("wan", {"image_dim": 12, "pos_embed_seq_len": 4}, "a first and a last frame"),
        ("cosmos", {"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type of Cosmos 1"),
        ("cosmos", {"in_channels": 5}, "video-to-world model"),
        ("cosmos", {"use_crossattn_projection": True}, "Cosmos-Predict2.5"),
        ("flux", {"in_channels": 20, "out_channels": 16}, "takes an image"),
    ],
)
def test_another_use_of_the_class_raises(
    architecture: Architecture, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        tiny_backbone(architecture, **settings)
