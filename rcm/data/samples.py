"""What a sample of latents and embeddings must look like, and what is wrong with one that does not.

Latents are in units of σd: normalised with the VAE's mean and standard deviation (or its scaling
factor and shift), as the diffusion model sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

LATENTS = "latents"  # the name of the latents beside the names of the condition
DTYPES = ("float16", "bfloat16", "float32")
CHANNELS_HINT = "Wan 2.1's latents have 16 channels, those of Wan 2.2's 5B model 48"
FRAMES_HINT = "77 video frames are 20 latent frames, 81 are 21"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SampleShapes:
    """The shapes of one sample, without a batch dimension."""

    latents: Shape
    """(channels, height, width), or (channels, frames, height, width)."""
    condition: Mapping[str, Shape]
    """Such as {"prompt_embeds": (tokens, dim)}; the names are the network's."""

    fixed: frozenset[str] = frozenset()
    """Names of the condition that guidance keeps, such as an image to start from."""

    def __post_init__(self) -> None:
        if LATENTS in self.condition:
            raise ValueError(f"a condition is named {LATENTS!r}, the name of the latents")

    def all(self) -> dict[str, Shape]:
        """Every tensor of a sample by name."""
        return {LATENTS: self.latents, **self.condition}

    def guided(self) -> dict[str, Shape]:
        """The condition that guidance replaces by a null condition."""
        return {name: x for name, x in self.condition.items() if name not in self.fixed}


def tensor_problem(name: str, dtype: str, shape: Shape, expected: Shape) -> str | None:
    """What is wrong with a tensor of that dtype and shape, or None."""
    if dtype not in DTYPES:
        return f"{name} are {dtype}; they must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
    if shape == expected:
        return None
    hint = ""
    if name == LATENTS and len(shape) == len(expected) == 4:
        if shape[0] != expected[0]:
            hint = f" ({CHANNELS_HINT})"
        elif shape[1] != expected[1]:
            hint = f" ({FRAMES_HINT})"
    return f"{name} have shape {shape}, expected {expected}{hint}"


def tensors_problem(tensors: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> str | None:
    """The first thing that is wrong with tensors of those names and shapes, or None."""
    for name, shape in expected.items():
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if problem := tensor_problem(name, dtype, tuple(tensor.shape), shape):
            return problem
        if bad := int((~tensor.isfinite()).sum()):
            return f"{name} have {bad} values that are NaN or infinite, of {tensor.numel()}"
    return None
