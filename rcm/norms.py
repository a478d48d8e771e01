"""Normalisations whose JVP has the right gradient.

The JVP of PyTorch's layer_norm, batch_norm and instance_norm is exact, but the gradient through it
is silently wrong: it takes the saved mean and standard deviation for constants (seen in torch 2.13;
pytorch/pytorch#196700 and #196699). rms_norm and group_norm are right.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# Functions that normalise by batch statistics if this argument is True.
_BATCH_STATISTICS: dict[Any, str] = {
    nn.functional.batch_norm: "training",
    nn.functional.instance_norm: "use_input_stats",
}


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """torch.layer_norm as rms_norm(x - mean), with statistics in float32 or better."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = nn.functional.rms_norm(centred, normalized_shape, eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    # CUDA's autocast leaves the result of layer_norm in float32.
    return y if input.is_cuda and torch.is_autocast_enabled("cuda") else y.to(input.dtype)


class _Gradients(threading.local):
    through_tangents = True


_gradients = _Gradients()


@contextmanager
def detached_tangents() -> Iterator[None]:
    """Inside, the caller needs no gradients through tangents, so that every norm is right."""
    before, _gradients.through_tangents = _gradients.through_tangents, False
    try:
        yield
    finally:
        _gradients.through_tangents = before


def needs_differentiable_norm(x: Tensor) -> bool:
    """Whether a gradient may flow through the JVP of a norm of x."""
    if not torch.is_grad_enabled() or forward_ad.unpack_dual(x).tangent is None:
        return False
    return _gradients.through_tangents or _inside_nested_jvp()


def _inside_nested_jvp() -> bool:
    """Whether this may be a block of checkpoint_jvp, whose second call must compute the same.

    It comes in the backward pass, outside of detached_tangents, at the same depth of jvps.
    torch.compile traces no jvp around checkpoint_jvp.
    """
    if torch.compiler.is_compiling():
        return False
    return len(torch._C._functorch.get_interpreter_stack() or ()) > 1


class DifferentiableNorms(TorchFunctionMode):
    """Inside, every module's normalisations have the right gradient through a JVP, or raise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.functional.layer_norm, torch.layer_norm):
            return layer_norm(*args, **kwargs)
        name = _BATCH_STATISTICS.get(func)
        if name is not None and kwargs[name]:
            raise NotImplementedError(
                f"the gradient through the JVP of {func.__name__} with {name}=True is wrong in "
                "PyTorch: use central_difference(h) or another normalisation"
            )
        return func(*args, **kwargs)
