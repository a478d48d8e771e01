"""Shapes in which names stand for sizes that the samples and embeddings of a run determine.

    "text"                         tokens of a text's embedding
    "image"                        tokens of an image's embedding
    "frames", "height", "width"    those of the sample's latents

("text", 4096) is the shape of an embedding with 4096 channels.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
NamedShape = tuple[int | str, ...]


def latent_sizes(shape: Sequence[int]) -> dict[str, int]:
    """Sizes of latents (channels, frames, height, width) or (channels, height, width) by name."""
    names = {3: ("height", "width"), 4: ("frames", "height", "width")}[len(shape)]
    return dict(zip(names, shape[1:], strict=True))


def resolve(name: str, shape: NamedShape, sizes: Mapping[str, T]) -> tuple[int | T, ...]:
    """The shape of the tensor `name` with sizes in place of names.

    Raises:
        ValueError: sizes has no such name, such as frames for images.
    """
    resolved: list[int | T] = []
    for size in shape:
        if isinstance(size, int):
            resolved.append(size)
        elif size in sizes:
            resolved.append(sizes[size])
        else:
            hint = "" if "frames" in sizes else "; latents of images have no frames"
            raise ValueError(
                f"{name} has the shape {shape}: {size!r} is neither a number nor one of "
                f"{', '.join(sizes)}{hint}"
            )
    return tuple(resolved)
