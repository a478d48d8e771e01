"""Derivatives of f at x along t by the transforms of torch.func, for the tests of composition.

f takes any number of tensors and returns a tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from tests.jvp_attn.attention_cases import Attention, Tensors, energy


def every(x: Tensors) -> tuple[int, ...]:
    return tuple(range(len(x)))


def at(x: Tensors, places: tuple[int, ...]) -> Tensors:
    return tuple(x[i] for i in places)


def restricted(f: Attention, x: Tensors, places: tuple[int, ...]) -> Attention:
    """f as a function of the arguments at these places; the others are those of x."""

    def of_some(*values: Tensor) -> Tensors:
        changed = dict(zip(places, values, strict=True))
        return f(*(changed.get(i, y) for i, y in enumerate(x)))

    return of_some


# ----------------------------------------------------------------------------
# First derivatives


def jvp_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(f, x, t)


def jvp_without_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    with torch.no_grad():
        return jvp(f, x, t)


def jvp_in_inference_mode(f: Attention, x: Tensors, t: Tensors) -> Any:
    with torch.inference_mode():
        return jvp(f, x, t)


def jvp_along_each_subset(f: Attention, x: Tensors, t: Tensors) -> Any:
    return {
        str(places): jvp(restricted(f, x, places), at(x, places), at(t, places))
        for number in range(1, len(x))
        for places in combinations(every(x), number)
    }


def vjp_(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, pull_back = vjp(f, *x)
    return pull_back(tuple(y.cos() for y in outputs))


def grad_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(f(*x)), every(x))(*x)


def grad_for_each(f: Attention, x: Tensors, t: Tensors) -> Any:
    return [grad(lambda *x: energy(f(*x)), i)(*x) for i in every(x)]


def jacfwd_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacfwd(f, every(x))(*x)


def jacrev_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(f, every(x))(*x)


# ----------------------------------------------------------------------------
# Gradients of tangents


def energy_of_tangent(f: Attention, x: Tensors, t: Tensors) -> Tensor:
    return energy(jvp(f, x, t)[1])


def grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy_of_tangent(f, x, t), every(x))(*x)


def grad_of_jvp_along_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    def along_one(*x: Tensor) -> Tensor:
        return energy_of_tangent(restricted(f, x, (0,)), x[:1], t[:1])

    return grad(along_one, every(x))(*x)


def grad_of_jvp_for_its_direction(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *t: energy_of_tangent(f, x, t), every(x))(*t)


def vjp_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    n = len(x)
    outputs, pull_back = vjp(lambda *xt: jvp(f, xt[:n], xt[n:]), *x, *t)
    return pull_back(tree_map(torch.cos, outputs))


# ----------------------------------------------------------------------------
# Second derivatives


def jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: grad_(f, x, t), x, t)


def jvp_of_grad_along_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda first: grad_(f, (first, *x[1:]), t), x[:1], t[:1])


def jvp_of_vjp_along_its_cotangent(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, pull_back = vjp(f, *x)
    return jvp(lambda *y: pull_back(y), outputs, tuple(y.cos() for y in outputs))


def grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(grad_(f, x, t)), every(x))(*x)


def hessian_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return hessian(lambda first: energy(f(first, *x[1:])))(x[0])


def in_a_plane(f: Attention, x: Tensors, t: Tensors) -> Callable[[Tensor], Tensor]:
    """f on a plane through x, as a function of two numbers."""
    return lambda a: energy(
        f(*(y + a[0] * ty + a[1] * ty.cos() for y, ty in zip(x, t, strict=True)))
    )


def hessian_in_a_plane(f: Attention, x: Tensors, t: Tensors) -> Any:
    return hessian(in_a_plane(f, x, t))(x[0].new_zeros(2))


def jacrev_of_jacfwd(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(jacfwd(in_a_plane(f, x, t)))(x[0].new_zeros(2))


def jacrev_of_jacrev(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacrev(jacrev(in_a_plane(f, x, t)))(x[0].new_zeros(2))


# ----------------------------------------------------------------------------
# vmap


def several(x: Tensors, dim: int = 0) -> Tensors:
    """Three different tensors stacked, for each of x."""
    return tuple(torch.stack([y, 2 * y, y.cos()], dim) for y in x)


def vmap_(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(f)(*several(x))


def vmap_over_each(f: Attention, x: Tensors, t: Tensors) -> Any:
    return [
        vmap(f, in_dims=tuple(0 if j == i else None for j in every(x)))(
            *x[:i], *several(x[i : i + 1]), *x[i + 1 :]
        )
        for i in every(x)
    ]


def vmap_over_inner_dimensions(f: Attention, x: Tensors, t: Tensors) -> Any:
    mapped = several(x[:1], 2) + several(x[1:2], -1) + x[2:]
    in_dims = (2, x[1].ndim, *(None for _ in x[2:]))
    return vmap(f, in_dims=in_dims, out_dims=1)(*mapped)


def vmap_of_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(vmap(f))(*several(several(x)))


def vmap_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    n = len(x)
    return vmap(lambda *xt: jvp(f, xt[:n], xt[n:]))(*several(x), *several(t))


def vmap_of_jvp_over_directions(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *t: jvp(f, x, t))(*several(t))


def jvp_of_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(vmap(f), several(x), several(t))


def jvp_of_vmap_over_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    over_one = vmap(f, in_dims=(0, *(None for _ in x[1:])))
    return jvp(over_one, several(x[:1]) + x[1:], several(t[:1]) + t[1:])


def vmap_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: grad_(f, x, t))(*several(x))


def vmap_of_grad_over_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda first: grad_(f, (first, *x[1:]), t))(*several(x[:1]))


def vmap_of_grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: grad_of_jvp(f, x, t))(*several(x))


def grad_of_vmap_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(tree_leaves(vmap_of_jvp(f, x, t))), every(x))(*x)


def vmap_of_jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: jvp_of_grad(f, x, t))(*several(x))


def vmap_of_grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return vmap(lambda *x: grad_of_grad(f, x, t))(*several(x))


# ----------------------------------------------------------------------------
# Third derivatives, and second ones of tangents in forward mode


def jvp_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: jvp(f, x, t)[1], x, t)


def jacfwd_of_jacfwd(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jacfwd(jacfwd(lambda first: f(first, *x[1:])))(x[0])


def jvp_of_grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: grad_of_jvp(f, x, t), x, t)


def jvp_of_grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: grad_of_grad(f, x, t), x, t)


def grad_of_grad_of_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(grad_of_jvp(f, x, t)), every(x))(*x)


def grad_of_jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(tree_leaves(jvp_of_grad(f, x, t))), every(x))(*x)


def grad_of_grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(grad_of_grad(f, x, t)), every(x))(*x)
