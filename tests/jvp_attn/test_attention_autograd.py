"""Plain autograd, with dual numbers, `.backward()` and checkpoints, goes through attention exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from attention_cases import Attention, Case, Named, assert_close, small_blocks
from torch import Tensor
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

CASES = {
    "grouped heads": Case(seqlen_q=3, seqlen_k=4),
    "causal": Case(seqlen_q=4, seqlen_k=4, heads=2, heads_k=2, causal=True),
}


def energy(outputs: tuple[Tensor, ...]) -> Tensor:
    """A function with derivatives of every order."""
    return sum((x**3).sum() for x in outputs)


def primals(x: Named) -> list[Tensor]:
    return [x["q"], x["k"], x["v"]]


def tangents(x: Named) -> list[Tensor]:
    return [x["tq"], x["tk"], x["tv"]]


def duals(x: Named, moving: str = "qkv") -> list[Tensor]:
    """q, k, v as dual numbers where they move; call it within a dual level."""
    return [fwAD.make_dual(x[n], x[f"t{n}"]) if n in moving else x[n] for n in "qkv"]


def unpacked(*outputs: Tensor) -> dict[str, Tensor]:
    """Primals and tangents of dual numbers, by number."""
    parts = itertools.chain.from_iterable(fwAD.unpack_dual(x) for x in outputs)
    return {str(i): x.detach() for i, x in enumerate(parts) if x is not None}


def grads_of(leaves: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): x.grad for i, x in enumerate(leaves) if x.grad is not None}


# ----------------------------------------------------------------------------
# Derivatives of f; all of q, k, v, tq, tk, tv require grad


def dual_numbers(f: Attention, x: Named) -> Named:
    x = {n: y.detach() for n, y in x.items()}
    with fwAD.dual_level():
        return unpacked(*f(*duals(x)))


def dual_numbers_that_require_grad(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        return unpacked(*f(*duals(x)))


def dual_numbers_without_grad(f: Attention, x: Named) -> Named:
    with torch.no_grad(), fwAD.dual_level():
        return unpacked(*f(*duals(x)))


def dual_q(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        return unpacked(*f(*duals(x, "q")))


def jvp_without_grad(f: Attention, x: Named) -> Named:
    with torch.no_grad():
        outputs = jvp(f, tuple(primals(x)), tuple(tangents(x)))
    return dict(zip("abcd", itertools.chain.from_iterable(outputs), strict=True))


def backward_through_jvp(f: Attention, x: Named) -> Named:
    outputs, t = jvp(f, tuple(primals(x)), tuple(tangents(x)))
    (energy(outputs) + energy(t)).backward()
    return grads_of([*x.values()])


def reverse_over_forward(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        t = [fwAD.unpack_dual(y).tangent for y in f(*duals(x))]
    energy(t).backward()
    return grads_of([*x.values()])


def reverse_over_forward_for_the_direction(f: Attention, x: Named) -> Named:
    x = {n: y if n.startswith("t") else y.detach() for n, y in x.items()}
    with fwAD.dual_level():
        t = [fwAD.unpack_dual(y).tangent for y in f(*duals(x))]
        energy(t).backward()
    return grads_of(tangents(x))


def forward_over_reverse(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        gradients = torch.autograd.grad(energy(f(*duals(x))), primals(x))
        return unpacked(*gradients)


def forward_over_reverse_along_q(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        gradients = torch.autograd.grad(energy(f(*duals(x, "q"))), primals(x))
        return unpacked(*gradients)


def forward_over_reverse_for_what_does_not_move(f: Attention, x: Named) -> Named:
    with fwAD.dual_level():
        outputs = f(fwAD.make_dual(x["q"].detach(), x["tq"]), x["k"], x["v"])
        return unpacked(*torch.autograd.grad(energy(outputs), primals(x)[1:]))


def gradient_penalty(f: Attention, x: Named) -> Named:
    gradients = torch.autograd.grad(energy(f(*primals(x))), primals(x), create_graph=True)
    energy(gradients).backward()
    return grads_of(primals(x))


def gradient_penalty_for_v(f: Attention, x: Named) -> Named:
    (gradient,) = torch.autograd.grad(energy(f(*primals(x))), x["v"], create_graph=True)
    energy((gradient,)).backward()
    return grads_of(primals(x))


def hessian_vector_product_by_double_backward(f: Attention, x: Named) -> Named:
    gradients = torch.autograd.grad(energy(f(*primals(x))), primals(x), create_graph=True)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents(x), strict=True))
    return dict(zip("qkv", torch.autograd.grad(along, primals(x)), strict=True))


def checkpoint_around_attention(f: Attention, x: Named) -> Named:
    energy(checkpoint(f, *primals(x), use_reentrant=False)).backward()
    return grads_of(primals(x))


def checkpoint_around_jvp(f: Attention, x: Named) -> Named:
    def with_tangent(*xt: Tensor) -> Tensor:
        outputs, t = jvp(f, xt[:3], xt[3:])
        return energy(outputs) + energy(t)

    checkpoint(with_tangent, *x.values(), use_reentrant=False).backward()
    return grads_of([*x.values()])


DERIVATIVES = [
    *(dual_numbers, dual_numbers_that_require_grad, dual_numbers_without_grad, dual_q),
    *(jvp_without_grad, backward_through_jvp),
    *(reverse_over_forward, reverse_over_forward_for_the_direction),
    *(forward_over_reverse, forward_over_reverse_along_q),
    forward_over_reverse_for_what_does_not_move,
    *(gradient_penalty, gradient_penalty_for_v, hessian_vector_product_by_double_backward),
    *(checkpoint_around_attention, checkpoint_around_jvp),
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda derivative: derivative.__name__)
def test_derivative_is_that_of_the_naive_formula(
    derivative: Callable[[Attention, Named], Named], case: Case
) -> None:
    def leaves() -> Named:
        return {name: x.requires_grad_() for name, x in case.data().items()}

    with small_blocks(scores=1, rows=2):
        ours = derivative(case.ours, leaves())
    assert ours
    assert_close(ours, derivative(case.naive, leaves()))
