"""`Backbone`: an unmodified transformer of diffusers as a TrigFlow network F(x, t, condition).

    F = ((cos(t) - sin(t)) x + v)/Z,     x_u = x/Z,     u = sin(t)/Z,     Z = cos(t) + sin(t)

v = ε - x0 is the model's prediction at (x_u, time_scale·u), see rcm.network_conversions. The unit
is σd = 1: x0 is the latent, normalised as the model's pipeline normalises it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from jvp_attn import replace_sdpa, scaled_dot_product_attention
from rcm.models.adapter import Adapter, Condition, SampleSpec, Settings
from rcm.named_shapes import NamedShape, latent_sizes, resolve
from rcm.network_conversions import from_rectified_flow
from rcm.time_precision import guard_time
from rcm.trigflow import require_precise_time

_ANY_TOKENS = {"text": "any", "image": "any"}
_DIMENSIONS = {3: "channels, height, width", 4: "channels, frames, height, width"}


class Backbone(nn.Module):
    """net(x, t, condition) -> F like x, in float32, or float64 if x is.

    x is (batch, channels, frames, height, width) or (batch, channels, height, width); t is (batch,)
    float32 or float64, and reaches the model's embedding in float32 whatever the dtype of its
    weights; condition is a dict of tensors (batch, ...), see `condition_shapes`.

    Args:
        model: a module of the adapter's class. Its attention goes to `attention`, an attribute with
            torch's signature; the default is jvp_attn's, and context parallelism sets another.
        adapter: see rcm.models.adapter.
        dtype: what x and condition are cast to; the dtype of the weights by default. FSDP2's mixed
            precision needs it: bfloat16 for weights that are kept in float32.

    Raises TypeError for a model of another class, or a condition that is no dict; ValueError for
    other shapes, names of conditions or times below float32; NotImplementedError for uses of the
    class that the adapter does not support and for the second time, `end`, of a flow map.
    """

    log_weight = None  # sCM's learned weight w(t), which these models do not have
    attention: Callable[..., Tensor]

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(model).__name__ != adapter.class_name:
            raise TypeError(
                f"the model is a {type(model).__name__}; its adapter is for {adapter.class_name}"
            )
        self.model, self.adapter, self.dtype = model, adapter, dtype
        adapter.require_supported(self.settings)
        self.attention = scaled_dot_product_attention
        self._model_class: Any = type(model)  # sharding changes the class of the model
        guard_time(model)

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None = None
    ) -> Tensor:
        if end is not None:
            raise NotImplementedError(
                f"{self.adapter.class_name} has one time; the methods of flow maps (meanflow, "
                "imeanflow, ayf, tvm) need a network with a second one, `end`. Use another method, "
                "such as rcm"
            )
        require_precise_time(t)
        self.require_sample_shape(tuple(x.shape[1:]))
        self._require_condition(condition, tuple(x.shape))
        return from_rectified_flow(self._predict, self.adapter.time_scale)(x, t, condition)

    def _predict(
        self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None = None
    ) -> Tensor:
        dtype = self.dtype or next(self.model.parameters()).dtype
        cast = {name: value.to(dtype) for name, value in condition.items()}
        with replace_sdpa(attention=self.attention):
            return self.adapter.predict(self.model, x.to(dtype), t, cast)

    # ---- conditions ----------------------------------------------------------------------------

    @property
    def condition_shapes(self) -> dict[str, NamedShape]:
        """The tensors of a condition and their shapes without the batch (rcm.named_shapes)."""
        conditions = self.adapter.conditions(self.settings)
        return {name: spec.shape for name, spec in conditions.items()}

    @property
    def fixed_conditions(self) -> tuple[str, ...]:
        """The tensors that an unconditional prediction keeps, such as an image to start from."""
        conditions = self.adapter.conditions(self.settings)
        return tuple(name for name, spec in conditions.items() if not spec.guided)

    def _require_condition(self, condition: Condition, x_shape: tuple[int, ...]) -> None:
        name, shapes = self.adapter.class_name, self.condition_shapes
        if not isinstance(condition, Mapping):
            raise TypeError(
                f"the condition is a {type(condition).__name__}; {name} takes a dict of tensors: "
                f"{', '.join(shapes)}"
            )
        if condition.keys() != shapes.keys():
            raise ValueError(
                f"the condition has {', '.join(condition) or 'no tensors'}; {name} takes "
                f"{', '.join(shapes)}"
            )
        batch, *sample = x_shape
        sizes: dict[str, int | str] = {**_ANY_TOKENS, **latent_sizes(sample)}
        for key, shape in shapes.items():
            given, expected = tuple(condition[key].shape), (batch, *resolve(key, shape, sizes))
            if len(given) != len(expected) or any(
                size not in ("any", g) for g, size in zip(given, expected, strict=True)
            ):
                raise ValueError(
                    f"{key} has shape {given}; {name} takes ({', '.join(map(str, expected))}) for "
                    f"x of shape {x_shape}"
                )

    # ---- samples -------------------------------------------------------------------------------

    @property
    def sample_spec(self) -> SampleSpec:
        return self.adapter.sample(self.settings)

    def require_sample_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the model takes samples of this shape, without the batch."""
        spec = self.sample_spec
        most = spec.max_size or shape[1:]
        allowed = (
            len(shape) == 1 + len(spec.patch)
            and shape[0] == spec.channels
            and all(
                0 < size <= limit and size % patch == 0
                for size, limit, patch in zip(shape[1:], most, spec.patch, strict=True)
            )
        )
        if not allowed:
            limit = f", at most {spec.max_size}" if spec.max_size else ""
            raise ValueError(
                f"samples have shape {shape}; {self.adapter.class_name} takes "
                f"({_DIMENSIONS[1 + len(spec.patch)]}) with {spec.channels} channels and other "
                f"sizes divisible by {spec.patch}{limit}"
            )

    # ---- the model -----------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[nn.ModuleList, ...]:
        """The lists of blocks: what sharding, checkpoints and compilation treat one by one."""
        return tuple(getattr(self.model, name) for name in self.adapter.blocks)

    @property
    def settings(self) -> Settings:
        """The arguments that the model was built with."""
        config: Any = self.model.config
        return dict(config)

    def enable_gradient_checkpointing(self, function: Callable[..., Tensor]) -> None:
        """Call each block as function(block, *arguments) wherever gradients are recorded."""
        model: Any = self.model
        model.enable_gradient_checkpointing(gradient_checkpointing_func=function)

    def remake_buffers(self) -> dict[str, Tensor]:
        """The buffers of `model` that no file contains, such as tables of rotary positions.

        Returns them by name on the CPU, equal to those of a normally built model. Build on the meta
        device, `to_empty` and `model.to(dtype)` lose or round them.
        """
        saved = self.model.state_dict().keys()
        unsaved = {name for name, _ in self.model.named_buffers() if name not in saved}
        if not unsaved:
            return {}
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            built = self._model_class.from_config(self.settings)
        return {name: built.get_buffer(name) for name in unsaved}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are built inside go to the meta device; buffers are made."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
