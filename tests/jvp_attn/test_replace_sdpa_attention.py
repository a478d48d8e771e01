"""`replace_sdpa(attention=...)`: every call of torch's attention goes to the attention given."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp

import jvp_attn
from jvp_attn import checkpoint_jvp, replace_sdpa
from tests.jvp_attn.attention_cases import assert_close, named
from tests.jvp_attn.compile_cases import in_one_graph
from tests.jvp_attn.sdpa_callers import (
    MODULES,
    TOKENS,
    TTOKENS,
    TX,
    X,
    by_torch,
    self_attention,
)


class Scaled:
    """Attention times a factor, which counts its calls."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.factor * jvp_attn.scaled_dot_product_attention(*args, **kwargs)


def doubled(*args: Any, **kwargs: Any) -> Tensor:
    return 2 * jvp_attn.scaled_dot_product_attention(*args, **kwargs)


def test_the_innermost_attention_counts() -> None:
    outer, inner = Scaled(2), Scaled(3)
    once = jvp_attn.scaled_dot_product_attention(X, X.sin(), X.cos())
    with replace_sdpa(attention=outer):
        with replace_sdpa(attention=inner):
            assert torch.equal(self_attention(X), 3 * once)
            with replace_sdpa():
                assert torch.equal(self_attention(X), once)
        assert torch.equal(self_attention(X), 2 * once)
    assert (outer.calls, inner.calls) == (1, 1)


@pytest.mark.parametrize(
    "operator",
    [
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
    ids=["operator", "overload"],
)
def test_operators_call_the_attention(operator: Any) -> None:
    with replace_sdpa(attention=doubled):
        assert torch.equal(operator(X, X.sin(), X.cos()), self_attention(X))


# ----------------------------------------------------------------------------
# torch.nn.MultiheadAttention, which calls torch's attention inside of a torch function


@pytest.mark.parametrize("what", MODULES)
def test_modules_of_torch_call_the_attention(what: str) -> None:
    module, call = MODULES[what]
    attention = Scaled(1)
    with replace_sdpa(attention=attention):
        actual = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
    assert attention.calls > 0
    assert_close(named(actual), named(by_torch(jvp, partial(call, module), (TOKENS,), (TTOKENS,))))


def test_attention_weights_raise_with_another_attention() -> None:
    module, _ = MODULES["MultiheadAttention"]
    with (
        replace_sdpa(attention=doubled),
        pytest.raises(NotImplementedError, match="pass need_weights=False"),
    ):
        module(TOKENS, TOKENS, TOKENS)


# ----------------------------------------------------------------------------
# Checkpoints, graphs


@pytest.mark.parametrize(
    "backward_in",
    [nullcontext, replace_sdpa, partial(replace_sdpa, attention=Scaled(5)), "nested"],
    ids=["outside", "default", "other", "same, then default"],
)
def test_checkpoints_recompute_with_the_attention_of_the_first_call(backward_in: Any) -> None:
    attention = Scaled(2)
    mode = replace_sdpa(attention=attention)

    def block(x: Tensor) -> Tensor:
        return self_attention(x.sin()).cos()

    def gradient(checkpoint: Any, around: Any) -> Tensor:
        x = X.clone().requires_grad_()
        with replace_sdpa(), mode:
            out, tangent = jvp(partial(checkpoint, block), (x,), (TX,))
        loss = (out**3).sum() + (tangent**3).sum()
        if around == "nested":
            with mode, replace_sdpa():
                return torch.autograd.grad(loss, x)[0]
        with around():
            return torch.autograd.grad(loss, x)[0]

    expected = gradient(lambda block, x: block(x), nullcontext)
    assert attention.calls == 1
    actual = gradient(checkpoint_jvp, backward_in)
    assert attention.calls == 3
    assert_close({"grad": actual}, {"grad": expected})


def test_a_compiled_function_calls_the_attention(fresh_compiler: None) -> None:
    compiled = in_one_graph(lambda x, tx: jvp(self_attention, (x,), (tx,)))
    for attention in (doubled, jvp_attn.scaled_dot_product_attention):
        with replace_sdpa(attention=attention):
            expected = jvp(self_attention, (X,), (TX,))
            assert_close(named(compiled(X, TX)), named(expected))


def test_compiled_modules_of_torch_call_the_attention(fresh_compiler: None) -> None:
    module, call = MODULES["MultiheadAttention"]
    compiled = in_one_graph(partial(call, module))
    for attention in (doubled, jvp_attn.scaled_dot_product_attention):
        with replace_sdpa(attention=attention):
            assert_close({"out": compiled(TOKENS)}, {"out": call(module, TOKENS)})


class CallsAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query=x, key=x.sin(), value=x.cos())


def test_a_symbolic_trace_contains_the_attention() -> None:
    with replace_sdpa(attention=doubled):
        graph = torch.fx.symbolic_trace(CallsAttention())
    assert doubled in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(X), 2 * jvp_attn.scaled_dot_product_attention(X, X.sin(), X.cos()))
