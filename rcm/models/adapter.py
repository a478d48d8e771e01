"""What distinguishes one transformer of diffusers from another: one `Adapter` for each class.

All of them are rectified-flow networks: the input is x_u = (1 - u) x0 + u ε and the prediction
ε - x0. They differ in the scale of the time, the conditions, the size of a token, and fixed
arguments. Adding a model is one adapter (docs/models.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rcm.named_shapes import NamedShape

Settings = Mapping[str, Any]
"""The arguments that a model was built with: `model.config` of diffusers."""
Condition = Mapping[str, Tensor]
"""Tensors (batch, ...) by name."""


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """The samples (batch, channels, frames, height, width) or (batch, channels, height, width)."""

    channels: int
    patch: tuple[int, ...]
    """Size of a token along each dimension after the channels; it divides the sample's."""
    max_size: tuple[int, ...] | None = None
    """The largest sample along the same dimensions, if positions limit it."""


@dataclass(frozen=True, kw_only=True)
class ConditionSpec:
    """One tensor of a condition."""

    shape: NamedShape
    """Shape without the batch, such as ("text", 4096); rcm.named_shapes has the names."""
    guided: bool = True
    """Whether an unconditional prediction replaces it. An image to start from stays."""


def supports_all(settings: Settings) -> None:
    """The check of an adapter that supports every setting of its class."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One class of diffusers as a rectified-flow network."""

    class_name: str
    """The class in diffusers."""
    time_scale: float
    """The network's time is time_scale·u."""
    predict: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    """(model, x_u, time_scale·u, condition) -> ε - x0 like x_u. The time is (batch,) float32."""
    sample: Callable[[Settings], SampleSpec]
    """Settings of the model -> the samples that it takes."""
    conditions: Callable[[Settings], dict[str, ConditionSpec]]
    """Settings of the model -> name -> tensor, by the names that diffusers' pipelines use."""
    blocks: tuple[str, ...]
    """Names of the model's lists of blocks."""
    require_supported: Callable[[Settings], None] = supports_all
    """Settings of the model -> nothing; raises NotImplementedError for other uses of the class."""
