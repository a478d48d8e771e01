"""Derivatives of f at x along t by torch.autograd, for the tests of composition.

f takes any number of tensors and returns a tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests.jvp_attn.attention_cases import Attention, Tensors, energy
from tests.jvp_attn.composition_func import grad_, several


def leaves(x: Tensors) -> Tensors:
    return tuple(y.detach().clone().requires_grad_() for y in x)


def duals(x: Tensors, t: Tensors) -> Tensors:
    """Dual numbers; call it within a dual level."""
    return tuple(fwAD.make_dual(y, ty) for y, ty in zip(x, t, strict=True))


def unpacked(numbers: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Primals and tangents; a missing tangent is zeros."""
    primals, output_tangents = zip(*map(fwAD.unpack_dual, numbers), strict=True)
    zeros = map(torch.zeros_like, primals)
    return list(primals), [
        z if t is None else t for z, t in zip(zeros, output_tangents, strict=True)
    ]


def tangents(numbers: Iterable[Tensor]) -> list[Tensor]:
    return unpacked(numbers)[1]


def grads(x: Tensors) -> list[Tensor]:
    """The gradients after .backward(); a missing gradient is zeros."""
    return [torch.zeros_like(y) if y.grad is None else y.grad for y in x]


# ----------------------------------------------------------------------------
# Dual numbers


def dual_numbers(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return unpacked(f(*duals(x, t)))


def dual_number_for_each(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return [unpacked(f(*x[:i], fwAD.make_dual(x[i], t[i]), *x[i + 1 :])) for i in range(len(x))]


def dual_numbers_that_require_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return unpacked(f(*duals(leaves(x), leaves(t))))


def dual_numbers_without_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    with torch.no_grad(), fwAD.dual_level():
        return unpacked(f(*duals(leaves(x), t)))


def dual_numbers_under_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return unpacked(vmap(f)(*duals(several(x), several(t))))


def backward_of_dual_numbers(f: Attention, x: Tensors, t: Tensors) -> Any:
    x, t = leaves(x), leaves(t)
    with fwAD.dual_level():
        output_tangents = tangents(f(*duals(x, t)))
    energy(output_tangents).backward()
    return grads(x + t)


def backward_of_dual_numbers_for_their_directions(f: Attention, x: Tensors, t: Tensors) -> Any:
    t = leaves(t)
    with fwAD.dual_level():
        output_tangents = tangents(f(*duals(x, t)))
    energy(output_tangents).backward()
    return grads(t)


def gradient_of_dual_numbers(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    with fwAD.dual_level():
        return unpacked(torch.autograd.grad(energy(f(*duals(x, t))), x))


def gradient_of_one_dual_number(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    with fwAD.dual_level():
        outputs = f(fwAD.make_dual(x[0], t[0]), *x[1:])
        return unpacked(torch.autograd.grad(energy(outputs), x))


def func_grad_of_dual_numbers(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return unpacked(grad_(f, duals(x, t), t))


# ----------------------------------------------------------------------------
# Gradients


def backward_(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    energy(f(*x)).backward()
    return grads(x)


def backward_of_vmap(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(several(x))
    energy(vmap(f)(*x)).backward()
    return grads(x)


def batched_gradients(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    outputs = f(*x)
    cotangents = several(tuple(y.detach() for y in outputs))
    return torch.autograd.grad(outputs, x, cotangents, is_grads_batched=True)


# ----------------------------------------------------------------------------
# .backward() after a jvp


def backward_through_out(f: Attention, x: Tensors, t: Tensors) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, _ = jvp(f, x, t)
    energy(outputs[:1]).backward()
    return grads(x + t)


def backward_through_tangent(f: Attention, x: Tensors, t: Tensors) -> Any:
    x, t = leaves(x), leaves(t)
    _, output_tangents = jvp(f, x, t)
    energy(output_tangents[:1]).backward()
    return grads(x + t)


def backward_through_out_and_tangent(f: Attention, x: Tensors, t: Tensors) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, output_tangents = jvp(f, x, t)
    energy(outputs[:1] + output_tangents[:1]).backward()
    return grads(x + t)


def backward_through_lse_and_mu(f: Attention, x: Tensors, t: Tensors) -> Any:
    """Through out and its tangent if lse is not returned."""
    x, t = leaves(x), leaves(t)
    outputs, output_tangents = jvp(f, x, t)
    energy(outputs[-1:] + output_tangents[-1:]).backward()
    return grads(x + t)


def backward_through_all(f: Attention, x: Tensors, t: Tensors) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, output_tangents = jvp(f, x, t)
    energy(outputs + output_tangents).backward()
    return grads(x + t)


def backward_to_some(f: Attention, x: Tensors, t: Tensors) -> Any:
    """The first input requires no grad, and the last has no tangent."""
    x = (x[0], *leaves(x[1:]))
    outputs, output_tangents = jvp(lambda *y: f(*y, x[-1]), x[:-1], t[:-1])
    energy(outputs + output_tangents).backward()
    return grads(x[1:])


# ----------------------------------------------------------------------------
# Second derivatives


def gradient_penalty(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    gradients = torch.autograd.grad(energy(f(*x)), x, create_graph=True)
    energy(gradients).backward()
    return grads(x)


def gradient_penalty_of_one(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    gradient = torch.autograd.grad(energy(f(*x)), x[:1], create_graph=True)
    energy(gradient).backward()
    return grads(x)


def double_backward_along_t(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    gradients = torch.autograd.grad(energy(f(*x)), x, create_graph=True)
    along = sum((g * ty).sum() for g, ty in zip(gradients, t, strict=True))
    return torch.autograd.grad(along, x)


def backward_of_func_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    energy(grad_(f, x, t)).backward()
    return grads(x)


def jvp_by_double_backward(f: Attention, x: Tensors, t: Tensors) -> Any:
    return torch.autograd.functional.jvp(f, x, t)


# ----------------------------------------------------------------------------
# Checkpoints


def checkpoint_around_attention(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    energy(checkpoint(f, *x, use_reentrant=False)).backward()
    return grads(x)


def checkpoint_around_jvp(f: Attention, x: Tensors, t: Tensors) -> Any:
    n, xt = len(x), leaves(x + t)

    def with_tangent(*xt: Tensor) -> Tensor:
        outputs, output_tangents = jvp(f, xt[:n], xt[n:])
        return energy(outputs + output_tangents)

    checkpoint(with_tangent, *xt, use_reentrant=False).backward()
    return grads(xt)


# ----------------------------------------------------------------------------
# Unsupported


def nested_dual_levels(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level(), fwAD.dual_level():
        return unpacked(f(*duals(x, t)))


def jacobian_in_forward_mode(f: Attention, x: Tensors, t: Tensors) -> Any:
    def of_first(first: Tensor) -> Tensor:
        return f(first, *x[1:])[0]

    return torch.autograd.functional.jacobian(
        of_first, x[0], vectorize=True, strategy="forward-mode"
    )


def func_jvp_within_a_dual_level(f: Attention, x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return jvp(f, duals(x, t), t)


def backward_through_tangent_within_its_level(f: Attention, x: Tensors, t: Tensors) -> Any:
    """The gradient would need a tangent, a third derivative."""
    x = leaves(x)
    with fwAD.dual_level():
        energy(tangents(f(*duals(x, t)))).backward()
        return grads(x)


def backward_thrice(f: Attention, x: Tensors, t: Tensors) -> Any:
    x = leaves(x)
    y = energy(f(*x))
    for _ in range(3):
        y = energy(torch.autograd.grad(y, x, create_graph=True))
    return y
