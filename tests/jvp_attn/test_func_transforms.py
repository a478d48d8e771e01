"""The transforms of torch.func, alone and composed, give the exact derivatives of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from jvp_attn import AttentionOptions, FlashAttention, FlashAttentionJvp
from jvp_attn.backends.select import resolve_backend
from tests.jvp_attn.attention_cases import (
    Attention,
    Case,
    Tensors,
    assert_close,
    energy,
    named,
    small_tiles,
)

QKV = (0, 1, 2)

CASES = {
    "grouped heads": Case(seqlen_q=3, seqlen_k=2, head_dim=2, head_dim_v=1),
    "causal": Case(batch=1, seqlen_q=4, seqlen_k=4, heads=2, heads_k=2, head_dim=1, causal=True),
}


# ----------------------------------------------------------------------------
# Derivatives of f at x = (q, k, v) along t


def jvp_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(f, x, t)


def jvp_along_q(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda q: f(q, *x[1:]), x[:1], t[:1])


def vjp_(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, pull_back = vjp(f, *x)
    return pull_back(tuple(y.cos() for y in outputs))


def vjp_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, pull_back = vjp(lambda *xt: jvp(f, xt[:3], xt[3:]), *x, *t)
    return pull_back(tuple(tuple(y.cos() for y in part) for part in outputs))


def grad_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(f(*x)), QKV)(*x)


def grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(jvp(f, x, t)[1]), QKV)(*x)


def grad_of_jvp_along_q(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(jvp_along_q(f, x, t)[1]), QKV)(*x)


def grad_for_the_direction_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *t: energy(jvp(f, x, t)[1]), QKV)(*t)


def jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(grad(lambda *x: energy(f(*x)), QKV), x, t)


def jvp_along_q_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda q: grad_(f, (q, *x[1:]), t), x[:1], t[:1])


def jvp_of_vjp_in_its_cotangent(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, pull_back = vjp(f, *x)
    return jvp(lambda *y: pull_back(y), outputs, tuple(y.cos() for y in outputs))


def grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(grad_(f, x, t)), QKV)(*x)


def hessian_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return hessian(lambda q, v: energy(f(q, x[1], v)), (0, 1))(x[0], x[2])


def jacfwd_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacfwd(f, QKV)(*x)


def jacrev_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(f, QKV)(*x)


def jacrev_of_jacfwd(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(jacfwd(lambda k: energy(f(x[0], k, x[2]))))(x[1])


def jacrev_of_jacrev(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(jacrev(lambda v: energy(f(x[0], x[1], v))))(x[2])


def several(x: Tensors, dim: int = 0) -> Tensors:
    """Three different tensors stacked, for each of x."""
    return tuple(torch.stack([y, 2 * y, y - 1], dim) for y in x)


def vmap_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(f)(*several(x))


def vmap_over_inner_dimensions(f: Attention, x: Tensors, t: Tensors) -> Any:
    q, k, v = several(x[:1], 2) + several(x[1:2], 4) + x[2:]
    return vmap(f, in_dims=(2, 4, None), out_dims=1)(q, k, v)


def vmap_over_directions_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *t: jvp(f, x, t))(*several(t))


def vmap_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *xt: jvp(f, xt[:3], xt[3:]))(*several(x), *several(t))


def jvp_of_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(vmap(f), several(x), several(t))


def jvp_of_vmap_over_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(vmap(f, in_dims=(0, None, None)), several(x[:1]) + x[1:], several(t[:1]) + t[1:])


def vmap_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: grad_(f, x, t))(*several(x))


def grad_of_vmap_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(tree_leaves(vmap_of_jvp(f, x, t))), QKV)(*x)


def vmap_of_grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: grad_of_jvp_along_q(f, x, t))(*several(x))


def vmap_of_jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: jvp_of_grad(f, x, t))(*several(x))


def vmap_of_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(vmap(f))(*several(several(x)))


DERIVATIVES = [
    *(jvp_, jvp_along_q, vjp_, vjp_of_jvp, grad_, grad_of_jvp, grad_of_jvp_along_q),
    *(grad_for_the_direction_of_jvp, jvp_of_grad, jvp_along_q_of_grad),
    *(jvp_of_vjp_in_its_cotangent, grad_of_grad),
    *(hessian_, jacfwd_, jacrev_, jacrev_of_jacfwd, jacrev_of_jacrev),
    *(vmap_, vmap_over_inner_dimensions, vmap_over_directions_of_jvp, vmap_of_jvp, jvp_of_vmap),
    *(jvp_of_vmap_over_one, vmap_of_grad, grad_of_vmap_of_jvp, vmap_of_grad_of_jvp),
    *(vmap_of_jvp_of_grad, vmap_of_vmap),
]


over_derivatives = pytest.mark.parametrize(
    "derivative", DERIVATIVES, ids=lambda derivative: derivative.__name__.rstrip("_")
)
Derivative = Callable[[Attention, Tensors, Tensors], Any]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@over_derivatives
def test_derivatives_equal_the_naive_formula(derivative: Derivative, case: Case) -> None:
    x, t = case.point_and_direction()
    with small_tiles(scores=1, rows=2):
        ours = derivative(case.ours, x, t)
    assert_close(named(ours), named(derivative(case.naive, x, t)))


# ----------------------------------------------------------------------------
# The public autograd Functions, through .apply


@pytest.mark.parametrize("kind", [None, "additive"])
@over_derivatives
def test_flash_attention_apply_has_every_derivative(
    derivative: Derivative, kind: str | None
) -> None:
    case = Case(seqlen_q=3, seqlen_k=4, head_dim=2, head_dim_v=3, softmax_scale=0.5, mask=kind)
    mask = case.primals().get("attn_mask")
    x, t = case.point_and_direction()
    options = AttentionOptions(0.5, backend=resolve_backend(*x[:3]))
    applied = derivative(
        lambda *x: FlashAttention.apply(*x, mask, None, None, None, options)[:2], x, t
    )
    expected = derivative(lambda *x: case.naive(*x, mask), x, t)
    assert_close(named(applied), named(expected))


def test_flash_attention_jvp_apply_has_gradients_under_vmap() -> None:
    case = Case(
        seqlen_q=3,
        seqlen_k=4,
        head_dim=2,
        head_dim_v=3,
        softmax_scale=0.5,
        mask="additive",
        with_tangent="qkvm",
    )
    x, t = case.point_and_direction()
    options = AttentionOptions(0.5, backend=resolve_backend(*x[:3]))

    def applied(*xt: Tensor) -> Tensors:
        return FlashAttentionJvp.apply(*xt[:4], None, None, None, *xt[4:], options)[:4]

    def naive(*xt: Tensor) -> Tensors:
        return tuple(tree_leaves(jvp(case.naive, xt[:4], xt[4:])))

    ours, expected = (
        vmap(grad(lambda *xt, f=f: energy(f(*xt)), tuple(range(8))))(*several(x + t))
        for f in (applied, naive)
    )
    assert_close(named(ours), named(expected))
