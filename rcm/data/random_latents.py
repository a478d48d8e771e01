"""Random latents and embeddings in real shards, for dry runs, demonstrations and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import functional

from rcm.data.latents import NEGATIVE
from rcm.data.samples import LATENTS, Shape

SAMPLES_PER_SHARD = 64
CELL = 4  # a random value for each so many elements of a dimension; linear in between


def write_random_latents(
    folder: Path,
    count: int,
    sample_shape: Shape,
    condition: Mapping[str, Shape],
    seed: int = 0,
) -> None:
    """Write `.safetensors` shards of smooth latents and random embeddings, and a negative one.

    The latents have mean 0 and standard deviation 1, and are smooth in space and time, so that
    a network can learn to denoise them. A folder that exists is written into.
    """
    generator = Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        samples = min(SAMPLES_PER_SHARD, count - start)
        tensors = {LATENTS: smooth_latents(samples, sample_shape, generator)}
        for name, shape in condition.items():
            tensors[name] = torch.randn(samples, *shape, generator=generator)
        save_file(tensors, folder / f"{number:05d}.safetensors")
    negative = {name: torch.randn(s, generator=generator) for name, s in condition.items()}
    save_file(negative, folder / NEGATIVE)


def smooth_latents(count: int, sample_shape: Shape, generator: Generator) -> Tensor:
    """(count, channels[, frames], height, width) float32: random fields, linear between points."""
    channels, *grid = sample_shape
    coarse = [math.ceil(size / CELL) + 1 for size in grid]
    mode = {2: "bilinear", 3: "trilinear"}[len(grid)]
    field = torch.randn(count, channels, *coarse, generator=generator)
    smooth = functional.interpolate(field, grid, mode=mode, align_corners=True)
    return (smooth - smooth.mean()) / smooth.std()
