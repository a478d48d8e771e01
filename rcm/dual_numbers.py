"""Dual numbers (x, tx) of the innermost torch.func.jvp, for derivative rules written by hand."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad


def split(x: Any) -> tuple[Any, Tensor | None]:
    """The primal and the tangent in the innermost jvp; the tangent is None if there is none.

    It is also None if the innermost transform of torch.func is not a jvp, and for a subclass of
    Tensor, such as DTensor: PyTorch differentiates both.
    """
    if not is_plain(x) or not x.is_floating_point() or not _may_have_tangent(x):
        return x, None
    dual = forward_ad.unpack_dual(x)
    return (x, None) if dual.tangent is None else (dual.primal, dual.tangent)


def is_plain(x: Any) -> bool:
    """Whether x is a tensor or a parameter, and of no subclass."""
    return type(x) is Tensor or type(x) is nn.Parameter


def is_recorded_inside(*xs: Any) -> bool:
    """Whether autograd records one of them inside of a transform of torch.func.

    A gradient that the network takes of itself then needs the tangents of what its graph saves. A
    rule would save primals, which have none.
    """
    if torch.compiler.is_compiling():
        return False
    return any(
        isinstance(x, Tensor) and x.requires_grad and _functorch.is_functorch_wrapped_tensor(x)
        for x in xs
    )


def joined(primal: Tensor, tangent: Tensor) -> Tensor:
    """The dual number of both; the tangent gets the dtype of the primal.

    Not to be called inside of of_tangents(detached=True), which would detach the primal.
    """
    return forward_ad.make_dual(primal, tangent.to(primal.dtype))


def of_tangents(*, detached: bool) -> AbstractContextManager[Any]:
    """Inside, tangents are computed: without a graph if they are detached."""
    return torch.no_grad() if detached else nullcontext()


def depth() -> int:
    """The number of active transforms of torch.func; inside of a compiled function 0 or 1."""
    if torch.compiler.is_compiling():
        return int(_any_transform())
    return len(_functorch.get_interpreter_stack() or ())


def _may_have_tangent(x: Tensor) -> bool:
    """Whether the innermost transform is a jvp which has wrapped x."""
    if torch.compiler.is_compiling():
        return _innermost_is_jvp()
    transform = _functorch.peek_interpreter_stack()
    if transform is None or transform.key() != _functorch.TransformType.Jvp:
        return False
    return _functorch.maybe_get_level(x) == transform.level()


@torch.compiler.assume_constant_result
def _innermost_is_jvp() -> bool:
    transform = _functorch.peek_interpreter_stack()
    return transform is not None and transform.key() == _functorch.TransformType.Jvp


@torch.compiler.assume_constant_result
def _any_transform() -> bool:
    return _functorch.peek_interpreter_stack() is not None
