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
from torch.func import grad, jvp

CASE = Case(seqlen_q=3, seqlen_k=4)
Compile = Callable[[Attention], Attention]


def network(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Attention between other operations."""
    out, lse = CASE.ours((q @ randn(3, 3, seed="first")).tanh(), k, v)
    return out @ randn(6, 2, seed="last"), lse


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ----------------------------------------------------------------------------
# Ways to use a function, all or part of which is compiled


def values_and_gradients(f: Attention, compiled: Compile) -> Any:
    return outputs_and_gradients(compiled(f), CASE.primals(), evaluate=without_tangents)


def jvp_of_compiled(f: Attention, compiled: Compile) -> Any:
    return outputs_and_gradients(compiled(f), CASE.data())


def jvp_within_compiled(f: Attention, compiled: Compile) -> Any:
    def tangents(_: Attention, x: Named) -> dict[str, Tensor]:
        return compiled(lambda x: with_tangents(f, x))(x)

    return outputs_and_gradients(f, CASE.data(), evaluate=tangents)


def jvp_within_compiled_without_grad(f: Attention, compiled: Compile) -> Any:
    with torch.no_grad():
        return compiled(lambda x: with_tangents(f, x))(CASE.data())


def grad_of_jvp_within_compiled(f: Attention, compiled: Compile) -> Any:
    x = CASE.data()
    return compiled(grad(lambda x: energy(with_tangents(f, x).values())))(x)


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


def gradient_penalty(f: Attention, compiled: Compile) -> Any:
    x = CASE.primals()
    q = x["q"].requires_grad_()
    (gradient,) = torch.autograd.grad(
        energy(compiled(f)(q, x["k"], x["v"])), q, create_graph=True
    )
    return torch.autograd.grad(energy([gradient]), q)


over_functions = pytest.mark.parametrize(
    "f", [CASE.ours, network], ids=["attention", "network"]
)


def compiled(f: Attention) -> Attention:
    return torch.compile(f, backend="aot_eager")


@over_functions
@pytest.mark.parametrize(
    "use",
    [
        values_and_gradients,
        jvp_of_compiled,
        jvp_within_compiled,
        jvp_within_compiled_without_grad,
        grad_of_jvp_within_compiled,
    ],
    ids=lambda use: use.__name__,
)
def test_equal(use,f) -> None:
    assert_close(named(use(f, compiled)), named(use(f, lambda f: f)))

@over_functions
@pytest.mark.parametrize(
    "use",
    [
        dual_numbers,dual_numbers_that_require_grad,forward_over_reverse,gradient_penalty
    ],
    ids=lambda use: use.__name__,
)
def test_equal_or_raise(use,f) -> None:
    try:
      r=use(f, compiled)
    except Exception as e:
      print(type(e),str(e)[:200])
      return
    assert_close(named(r), named(use(f, lambda f: f)))
