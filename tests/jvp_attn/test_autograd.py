"""Dual numbers, `.backward()`, autograd.grad and checkpoints give exact derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

from tests.jvp_attn.attention_cases import (
    Attention,
    Case,
    Named,
    assert_close,
    energy,
    named,
    small_tiles,
)

CASES = {
    "grouped heads": Case(seqlen_q=3, seqlen_k=4),
    "causal": Case(seqlen_q=4, seqlen_k=4, heads=2, heads_k=2, causal=True),
}


def primals(x: Named) -> list[Tensor]:
    return [x["q"], x["k"], x["v"]]


def tangents(x: Named) -> list[Tensor]:
    return [x["tq"], x["tk"], x["tv"]]


def duals(x: Named, with_tangent: str = "qkv") -> list[Tensor]:
    """q, k, v, those with a tangent as dual numbers; call it within a dual level."""
    return [fwAD.make_dual(x[n], x[f"t{n}"]) if n in with_tangent else x[n] for n in "qkv"]


def primals_and_tangents(numbers: Iterable[Tensor]) -> list[Tensor | None]:
    return [part for x in numbers for part in fwAD.unpack_dual(x)]


def grads(leaves: Iterable[Tensor]) -> list[Tensor | None]:
    return [x.grad for x in leaves]


# ----------------------------------------------------------------------------
# Derivatives of f; all of q, k, v, tq, tk, tv require grad


def dual_numbers(f: Attention, x: Named) -> Any:
    x = {n: y.detach() for n, y in x.items()}
    with fwAD.dual_level():
        return primals_and_tangents(f(*duals(x)))


def dual_numbers_that_require_grad(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        return primals_and_tangents(f(*duals(x)))


def dual_numbers_without_grad(f: Attention, x: Named) -> Any:
    with torch.no_grad(), fwAD.dual_level():
        return primals_and_tangents(f(*duals(x)))


def dual_q(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        return primals_and_tangents(f(*duals(x, "q")))


def jvp_without_grad(f: Attention, x: Named) -> Any:
    with torch.no_grad():
        return jvp(f, tuple(primals(x)), tuple(tangents(x)))


def backward_through_jvp(f: Attention, x: Named) -> Any:
    outputs, t = jvp(f, tuple(primals(x)), tuple(tangents(x)))
    (energy(outputs) + energy(t)).backward()
    return grads(x.values())


def reverse_over_forward(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        t = [fwAD.unpack_dual(y).tangent for y in f(*duals(x))]
    energy(t).backward()
    return grads(x.values())


def reverse_over_forward_for_the_direction(f: Attention, x: Named) -> Any:
    x = {n: y if n.startswith("t") else y.detach() for n, y in x.items()}
    with fwAD.dual_level():
        t = [fwAD.unpack_dual(y).tangent for y in f(*duals(x))]
        energy(t).backward()
    return grads(tangents(x))


def forward_over_reverse(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        gradients = torch.autograd.grad(energy(f(*duals(x))), primals(x))
        return primals_and_tangents(gradients)


def forward_over_reverse_along_q(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        gradients = torch.autograd.grad(energy(f(*duals(x, "q"))), primals(x))
        return primals_and_tangents(gradients)


def forward_over_reverse_for_inputs_without_tangent(f: Attention, x: Named) -> Any:
    with fwAD.dual_level():
        outputs = f(fwAD.make_dual(x["q"].detach(), x["tq"]), x["k"], x["v"])
        return primals_and_tangents(torch.autograd.grad(energy(outputs), primals(x)[1:]))


def gradient_penalty(f: Attention, x: Named) -> Any:
    gradients = torch.autograd.grad(energy(f(*primals(x))), primals(x), create_graph=True)
    energy(gradients).backward()
    return grads(primals(x))


def gradient_penalty_for_v(f: Attention, x: Named) -> Any:
    (gradient,) = torch.autograd.grad(energy(f(*primals(x))), x["v"], create_graph=True)
    energy((gradient,)).backward()
    return grads(primals(x))


def hessian_vector_product_by_double_backward(f: Attention, x: Named) -> Any:
    gradients = torch.autograd.grad(energy(f(*primals(x))), primals(x), create_graph=True)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents(x), strict=True))
    return torch.autograd.grad(along, primals(x))


def checkpoint_around_attention(f: Attention, x: Named) -> Any:
    energy(checkpoint(f, *primals(x), use_reentrant=False)).backward()
    return grads(primals(x))


def checkpoint_around_jvp(f: Attention, x: Named) -> Any:
    def with_tangent(*xt: Tensor) -> Tensor:
        outputs, t = jvp(f, xt[:3], xt[3:])
        return energy(outputs) + energy(t)

    checkpoint(with_tangent, *x.values(), use_reentrant=False).backward()
    return grads(x.values())


DERIVATIVES = [
    *(dual_numbers, dual_numbers_that_require_grad, dual_numbers_without_grad, dual_q),
    *(jvp_without_grad, backward_through_jvp),
    *(reverse_over_forward, reverse_over_forward_for_the_direction),
    *(forward_over_reverse, forward_over_reverse_along_q),
    forward_over_reverse_for_inputs_without_tangent,
    *(gradient_penalty, gradient_penalty_for_v, hessian_vector_product_by_double_backward),
    *(checkpoint_around_attention, checkpoint_around_jvp),
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda derivative: derivative.__name__)
def test_derivatives_equal_the_naive_formula(
    derivative: Callable[[Attention, Named], Any], case: Case
) -> None:
    def leaves() -> Named:
        return {name: x.requires_grad_() for name, x in case.data().items()}

    with small_tiles(scores=1, rows=2):
        ours = derivative(case.ours, leaves())
    assert_close(named(ours), named(derivative(case.naive, leaves())))
