"""Inside `replace_sdpa()`, the rules of a custom Function call this package's attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode

import jvp_attn
from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import Tensors, assert_close, named
from tests.jvp_attn.sdpa_callers import TX, Function, X, by_torch, self_attention


class Weighted(torch.autograd.Function):
    """x times the attention of a constant, which every rule computes again."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * self_attention(CONSTANT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * self_attention(CONSTANT)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * self_attention(CONSTANT)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Weighted.apply(x), in_dims[0]


CONSTANT = X.exp()


def with_dual_numbers(f: Function) -> Tensors:
    with fwAD.dual_level():
        return tuple(fwAD.unpack_dual(f(fwAD.make_dual(X, TX))))


def backward_after_jvp(f: Function) -> Any:
    x = X.clone().requires_grad_()
    outputs = jvp(f, (x,), (TX,))
    return outputs, torch.autograd.grad(sum((y**3).sum() for y in outputs), x)


# Each with the number of rules that it runs.
USES: dict[str, tuple[int, Callable[[Function], Any]]] = {
    "no transform": (1, lambda f: f(X)),
    "jvp": (2, lambda f: jvp(f, (X,), (TX,))),
    "dual numbers": (2, with_dual_numbers),
    "grad": (2, lambda f: grad(lambda x: (f(x) ** 3).sum())(X)),
    "grad of jvp": (2, lambda f: grad(lambda x: (jvp(f, (x,), (x.sin(),))[1] ** 3).sum())(X)),
    "vmap of jvp": (2, lambda f: vmap(lambda x: jvp(f, (x,), (TX,)))(torch.stack([X, TX]))),
    "backward after jvp": (3, backward_after_jvp),
}


@pytest.mark.parametrize("use", USES)
def test_all_rules_of_a_function_call_the_attention(use: str) -> None:
    rules, result = USES[use]
    calls: list[None] = []

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return 2 * jvp_attn.scaled_dot_product_attention(*args, **kwargs)

    with replace_sdpa(attention=attention):
        weights = self_attention(CONSTANT)
        calls.clear()
        actual = result(Weighted.apply)
    assert len(calls) == rules
    assert_close(named(actual), named(result(lambda x: x * weights)))


def test_a_jvp_inside_of_a_function_has_a_tangent() -> None:
    """As a network evaluated in one pass for its output and for its tangent does."""

    class Tangent(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                return jvp(self_attention, (x,), (TX,))[1]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            _, gradient = vjp(lambda x: jvp(self_attention, (x,), (TX,))[1], *ctx.saved_tensors)
            return gradient(cotangent)[0]

    def result(f: Function) -> Any:
        return grad(lambda x: (f(x) ** 3).sum())(X)

    with replace_sdpa():
        actual = result(Tangent.apply)
    expected = by_torch(result, lambda x: jvp(self_attention, (x,), (TX,))[1])
    assert_close({"grad": actual}, {"grad": expected})


# ----------------------------------------------------------------------------
# Other Functions and other modes


class Doubled(torch.autograd.Function):
    """In place, with an output that is no tensor."""

    @staticmethod
    def forward(x: Tensor, factor: float, scale: float = 2.0) -> Any:
        return x.mul_(scale * factor), "text"

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.factor, ctx.scale = inputs
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> Any:
        return cotangent * ctx.factor * ctx.scale, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return tangent.mul_(ctx.factor * ctx.scale), None


@pytest.mark.parametrize("around", [nullcontext, replace_sdpa])
def test_other_functions_behave_as_outside(around: Any) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        z, text = Doubled.apply(y, 3.0)
        assert z is y
        assert text == "text"
        return z.sin()

    with around():
        out, tangent = jvp(f, (X,), (TX,))
        gradient = grad(lambda x: f(x).sum())(X)
    assert_close(
        {"out": out, "tangent": tangent, "gradient": gradient},
        {"out": (6 * X).sin(), "tangent": 6 * TX * (6 * X).cos(), "gradient": 6 * (6 * X).cos()},
    )


def test_a_function_without_a_rule_raises_as_outside() -> None:
    class NoRule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

    with replace_sdpa(), pytest.raises(RuntimeError, match="setup_context"):
        jvp(NoRule.apply, (X,), (TX,))


class Recorder(TorchFunctionMode):
    """Lists the calls it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_inside_the_block_sees_the_call_of_a_function_once() -> None:
    with replace_sdpa(), Recorder() as recorder:
        jvp(Weighted.apply, (X,), (TX,))
    names = [str(func) for func in recorder.seen]
    assert names.count("custom_function_call") == 1
    assert torch.nn.functional.scaled_dot_product_attention not in recorder.seen
