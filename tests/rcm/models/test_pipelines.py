"""Samples of diffusers' own pipelines are those of the same steps with the TrigFlow network.

The pipelines run unmodified, with random latents and embeddings and without encoders.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.models.backbone import Backbone
from rcm.network_conversions import to_rectified_flow
from rcm.trigflow import denoise
from tests.rcm.models.backbones import BATCH, example, tiny_backbone

pytestmark = pytest.mark.slow  # importing the pipelines takes 10 seconds

# The schedulers round timesteps up to 1000 to float32.
TOLERANCE = {"rtol": 0, "atol": 5e-5}
SIZE = {"height": 48, "width": 80, "num_inference_steps": 3}


def euler(net: Backbone, x: Tensor, sigmas: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """Steps of rectified flow from noise to data."""
    velocity = to_rectified_flow(net)
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma.expand(BATCH), condition)
    return x


def without_encoders(pipeline: type, net: Backbone, *encoders: str, **scheduler: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    built = pipeline(
        transformer=net.model,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        **dict.fromkeys(encoders),
    )
    built.set_progress_bar_config(disable=True)
    return built


@torch.no_grad()
def test_wan() -> None:
    from diffusers import WanPipeline

    net = tiny_backbone("wan")
    x, _, condition = example("wan")
    pipeline = without_encoders(WanPipeline, net, "tokenizer", "text_encoder", shift=5.0)
    samples = pipeline(
        **SIZE,
        **condition,
        latents=x,
        num_frames=9,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    expected = euler(net, x, pipeline.scheduler.sigmas, condition)
    torch.testing.assert_close(samples, expected, **TOLERANCE)


@torch.no_grad()
def test_sd3() -> None:
    from diffusers import StableDiffusion3Pipeline

    net = tiny_backbone("sd3")
    x, _, condition = example("sd3")
    encoders = (f"{part}{i}" for part in ("tokenizer", "text_encoder") for i in ("", "_2", "_3"))
    pipeline = without_encoders(StableDiffusion3Pipeline, net, *encoders, shift=3.0)
    samples = pipeline(
        **SIZE, **condition, latents=x, guidance_scale=1.0, output_type="latent"
    ).images
    expected = euler(net, x, pipeline.scheduler.sigmas, condition)
    torch.testing.assert_close(samples, expected, **TOLERANCE)


@torch.no_grad()
def test_flux() -> None:
    from diffusers import FluxPipeline

    net = tiny_backbone("flux")
    x, _, condition = example("flux")
    encoders = (f"{part}{i}" for part in ("tokenizer", "text_encoder") for i in ("", "_2"))
    pipeline = without_encoders(FluxPipeline, net, *encoders, use_dynamic_shifting=True)
    packed = pipeline._pack_latents(x, *x.shape)
    samples = pipeline(**SIZE, **condition, latents=packed, output_type="latent").images
    expected = euler(net, x, pipeline.scheduler.sigmas, condition)
    samples = pipeline._unpack_latents(samples, SIZE["height"], SIZE["width"], 8)
    torch.testing.assert_close(samples, expected, **TOLERANCE)


class NoSafetyChecker:
    """The place of a package that checks prompts and decoded images; here are neither."""

    def to(self, device: str) -> None:
        pass


@torch.no_grad()
def test_cosmos() -> None:
    """Without the padding mask, for which the pipeline needs torchvision."""
    from diffusers import Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler

    net = tiny_backbone("cosmos", concat_padding_mask=False)
    x, _, condition = example("cosmos")
    x = x[:, :, :1]
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.sigma_max, scheduler.sigma_min = 80.0, 0.002
    scheduler.register_to_config(
        sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min"
    )
    pipeline = Cosmos2TextToImagePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=net.model,
        vae=None,
        scheduler=scheduler,
        safety_checker=NoSafetyChecker(),
    )
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        **SIZE, **condition, latents=x, guidance_scale=1.0, output_type="latent"
    ).images
    noisy, sigmas = 80.0 * x, scheduler.sigmas
    for sigma, following in pairwise(sigmas):
        t = torch.atan(sigma.double()).expand(BATCH)
        x0 = denoise(net, noisy * math.cos(t[0]), t, condition)
        noisy = noisy + (following - sigma) * (noisy - x0) / sigma
    torch.testing.assert_close(samples, noisy[:, :, 0], **TOLERANCE)
