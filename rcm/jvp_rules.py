"""Rules with which the JVP of a network takes about the time of two forward passes.

torch.func.jvp of torch 2.13 does much that is not needed. Every linear layer multiplies its input
with a tangent of the weight that is zero: three matrix products instead of two. Every addition or
multiplication with a constant, such as a bias of positions, computes with zeros in Python. And it
records the graph of the tangent for a caller that detaches it. A rule here takes a function's dual
numbers apart and computes primal and tangent itself:

    linear      y = x Wᵀ + b       ty = tx Wᵀ            where neither W nor b has a tangent
    a ∘ b       y = a ∘ b          ∘ is +, -, × or ÷     where one of them has a tangent
    addcmul     y = a + b c        ty = ta + tb c + b tc in two operations
    norms       rcm/norms.py

PyTorch differentiates everything else, under every transform: the rules are only for tensors with a
tangent in the innermost jvp, not for subclasses of Tensor, and not where the network itself records
a graph. Values and derivatives of any order are those of PyTorch up to rounding.

A mode sees calls from Python. The gradient through the JVP of a LayerNorm of torch.jit.script, or
of torch.ops.aten.layer_norm, stays wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from rcm.dual_numbers import depth, is_plain, is_recorded_inside, joined, of_tangents, split
from rcm.norms import (
    WRONG_GRADIENT,
    is_fixed,
    layer_norm,
    layer_norm_rule,
    raise_for_wrong_gradient,
    rms_norm_rule,
)


class JvpRules(TorchFunctionMode):
    """Inside, a jvp uses these rules.

    Gradients through tangents are right or raise: NotImplementedError for norms of batch
    statistics, if gradients are enabled. With detached=True the caller needs no gradient through a
    tangent of the next jvp, and the rules record none; those of a jvp inside of it are recorded.
    """

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached, self.depth = detached, depth()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None and func not in WRONG_GRADIENT:
            return func(*args, **kwargs)
        detached = self.detached and depth() <= self.depth + 1
        if rule is not None:
            return rule(*args, **kwargs, detached=detached)
        if torch.is_grad_enabled() and not detached:
            raise_for_wrong_gradient(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def without_rules() -> Iterator[None]:
    """Inside, the rules are not active, and other modes are."""
    modes = _get_current_function_mode_stack()
    if not any(isinstance(mode, JvpRules) for mode in modes):
        yield
        return
    others = [mode for mode in modes if not isinstance(mode, JvpRules)]
    _replace_modes(modes, others)
    try:
        yield
    finally:
        _replace_modes(others, modes)


def _replace_modes(old: list[TorchFunctionMode], new: list[TorchFunctionMode]) -> None:
    for _ in old:
        _pop_mode()
    for mode in new:
        _push_mode(mode)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, detached: bool) -> Tensor:
    linear = nn.functional.linear
    x, tangent = split(input)
    fixed = is_fixed(weight) and is_fixed(bias)
    if tangent is None or not fixed or is_recorded_inside(input, weight, bias):
        return linear(input, weight, bias)
    with of_tangents(detached=detached):
        tangent = linear(tangent, weight)
    return joined(linear(x, weight, bias), tangent)


def _addcmul(*args: Any, detached: bool, **kwargs: Any) -> Tensor:
    if len(args) != 3 or kwargs or is_recorded_inside(*args):
        return torch.addcmul(*args, **kwargs)
    (a, ta), (b, tb), (c, tc) = map(split, args)
    if ta is None or tb is None or tc is None:
        return torch.addcmul(*args)
    with of_tangents(detached=detached):
        tangent = torch.addcmul(torch.addcmul(ta, tb, c), b, tc)
    return joined(torch.addcmul(a, b, c), tangent)


def _binary(
    function: Callable[..., Tensor],
    of_first: Callable[[Tensor, Any], Tensor],
    of_second: Callable[[Any, Tensor], Tensor] | None,
    *args: Any,
    detached: bool,
    **kwargs: Any,
) -> Tensor:
    """function(a, b), where one of both has a tangent; the tangent of the result is new memory.

    of_first(ta, b), of_second(a, tb): the tangent of the result; None leaves it to PyTorch.
    """
    if len(args) != 2 or kwargs or is_recorded_inside(*args):
        return function(*args, **kwargs)
    (a, ta), (b, tb) = split(args[0]), split(args[1])
    if ta is not None and tb is None and _is_known(args[1]):
        y = function(a, b)
        with of_tangents(detached=detached):
            tangent = of_first(ta, b)
    elif tb is not None and ta is None and _is_known(args[0]) and of_second is not None:
        y = function(a, b)
        with of_tangents(detached=detached):
            tangent = of_second(a, tb)
    else:
        return function(*args)
    return joined(y, tangent.expand(y.shape))


def _is_known(x: Any) -> bool:
    """Whether `split` sees every tangent of x."""
    return isinstance(x, int | float) or (is_plain(x) and not x.is_complex())


def _copied(tangent: Tensor, constant: Any) -> Tensor:
    # PyTorch may change a tensor and its tangent in place; the sum must not change with it.
    return tangent.clone()


_add = partial(_binary, torch.add, _copied, lambda a, tb: tb.clone())
_subtract = partial(_binary, torch.sub, _copied, lambda a, tb: -tb)
_multiply = partial(_binary, torch.mul, torch.mul, torch.mul)
_divide = partial(_binary, torch.div, torch.div, None)

RULES: dict[Any, Callable[..., Tensor]] = {
    nn.functional.linear: _linear,
    torch.addcmul: _addcmul,
    torch.Tensor.addcmul: _addcmul,
    **dict.fromkeys((layer_norm, nn.functional.layer_norm, torch.layer_norm), layer_norm_rule),
    **dict.fromkeys((nn.functional.rms_norm, torch.rms_norm), rms_norm_rule),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _subtract),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _divide),
}
