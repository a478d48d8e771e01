"""Compiled attention equals eager attention or raises; it never loses a tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from attention_cases import (
    Attention,
    Case,
    Named,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    randn,
    with_tangents,
    without_tangents,
)
from torch import Tensor
from torch.func import grad

CASE = Case(seqlen_q=3, seqlen_k=4)
# Makes a compiled function of a function.
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def network(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Attention between other operations."""
    out, lse = CASE.ours((q @ randn(3, 3, seed="first")).tanh(), k, v)
    return out @ randn(6, 2, seed="last"), lse


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ----------------------------------------------------------------------------
# Derivatives of a function that is compiled, or that are compiled with it


def values_and_gradients(f: Attention, compiled: Compile) -> Any:
    return outputs_and_gradients(compiled(f), CASE.primals(), evaluate=without_tangents)


def gradient_penalty(f: Attention, compiled: Compile) -> Any:
    x = CASE.primals()
    q = x["q"].requires_grad_()
    outputs = compiled(f)(q, x["k"], x["v"])
    (gradient,) = torch.autograd.grad(energy(outputs), q, create_graph=True)
    return torch.autograd.grad(energy([gradient]), q)


def jvp_of_compiled(f: Attention, compiled: Compile) -> Any:
    return outputs_and_gradients(compiled(f), CASE.data())


def jvp_within_compiled(f: Attention, compiled: Compile) -> Any:
    def compiled_jvp(attention: Attention, x: Named) -> dict[str, Tensor]:
        return compiled(lambda x: with_tangents(attention, x))(x)

    return outputs_and_gradients(f, CASE.data(), evaluate=compiled_jvp)


def jvp_within_compiled_without_grad(f: Attention, compiled: Compile) -> Any:
    with torch.no_grad():
        return compiled(lambda x: with_tangents(f, x))(CASE.data())


def grad_of_jvp_within_compiled(f: Attention, compiled: Compile) -> Any:
    return compiled(grad(lambda x: energy(with_tangents(f, x).values())))(CASE.data())


def dual_numbers(f: Attention, compiled: Compile) -> Any:
    x = CASE.data()
    with fwAD.dual_level():
        outputs = compiled(f)(fwAD.make_dual(x["q"], x["tq"]), x["k"], x["v"])
        return [fwAD.unpack_dual(y) for y in outputs]


def dual_numbers_that_require_grad(f: Attention, compiled: Compile) -> Any:
    x = CASE.data()
    with fwAD.dual_level():
        q = fwAD.make_dual(x["q"].requires_grad_(), x["tq"])
        return [fwAD.unpack_dual(y) for y in compiled(f)(q, x["k"], x["v"])]


def forward_over_reverse(f: Attention, compiled: Compile) -> Any:
    x = CASE.data()
    q = x["q"].requires_grad_()
    with fwAD.dual_level():
        outputs = compiled(f)(fwAD.make_dual(q, x["tq"]), x["k"], x["v"])
        return fwAD.unpack_dual(*torch.autograd.grad(energy(outputs), q))


def eager(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def aot_eager(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager")


def aot_eager_in_one_graph(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


over_functions = pytest.mark.parametrize("f", [CASE.ours, network], ids=["attention", "network"])
Derivative = Callable[[Attention, Compile], Any]
FUNCTIONAL = [
    values_and_gradients,
    *(jvp_of_compiled, jvp_within_compiled, jvp_within_compiled_without_grad),
    grad_of_jvp_within_compiled,
]
NOT_ALL_SUPPORTED_BY_TORCH = [
    gradient_penalty,
    *(dual_numbers, dual_numbers_that_require_grad, forward_over_reverse),
]


@over_functions
@pytest.mark.parametrize("derivative", FUNCTIONAL, ids=lambda derivative: derivative.__name__)
def test_compiled_equals_eager(derivative: Derivative, f: Attention) -> None:
    assert_close(named(derivative(f, aot_eager)), named(derivative(f, eager)))


def assert_equal_or_raises(derivative: Derivative, f: Attention, compiled: Compile) -> None:
    try:
        found = derivative(f, compiled)
    except RuntimeError:  # also NotImplementedError and what Dynamo raises
        return
    assert_close(named(found), named(derivative(f, eager)))


@over_functions
@pytest.mark.parametrize(
    "derivative", NOT_ALL_SUPPORTED_BY_TORCH, ids=lambda derivative: derivative.__name__
)
def test_compiled_equals_eager_or_raises(derivative: Derivative, f: Attention) -> None:
    assert_equal_or_raises(derivative, f, aot_eager)


@pytest.mark.parametrize(
    "derivative",
    [*FUNCTIONAL, *NOT_ALL_SUPPORTED_BY_TORCH],
    ids=lambda derivative: derivative.__name__,
)
def test_compiled_in_one_graph_equals_eager_or_raises(derivative: Derivative) -> None:
    assert_equal_or_raises(derivative, network, aot_eager_in_one_graph)
