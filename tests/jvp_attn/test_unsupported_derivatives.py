"""Derivatives of an order that is not supported raise; they are never silently zero."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, jvp

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from tests.jvp_attn.attention_cases import Case, relative_error

X = Case().data()
NO_JVP_OF_JVP = (
    "differentiate the tangent in reverse mode, with torch.func.grad or .backward(), or nest "
    "torch.func.jvp in `with jvp_attn.backend('math')`"
)
NO_THIRD = "use `with jvp_attn.backend('math')`, which differentiates to any order"


def f(q: Tensor) -> Tensor:
    return flash_attn_jvp(q, X["k"], X["v"]).pow(3).sum()


def jvp_f(q: Tensor) -> Tensor:
    return jvp(f, (q,), (X["tq"],))[1]


def jvp_f_along_k(q: Tensor) -> Tensor:
    return jvp(lambda k: flash_attn_jvp(q, k, X["v"]), (X["k"],), (X["tk"],))[1]


def tangent_by_hand(q: Tensor) -> Tensor:
    return flash_attn_with_tangent(q, X["k"], X["v"], X["tq"])[1]


def grad_f(q: Tensor) -> Tensor:
    return grad(f)(q).pow(3).sum()


def grad_jvp_f(q: Tensor) -> Tensor:
    return grad(jvp_f)(q).pow(3).sum()


def grad_grad_f(q: Tensor) -> Tensor:
    return grad(grad_f)(q).pow(3).sum()


@pytest.mark.parametrize(
    "tangent", [jvp_f, jvp_f_along_k, tangent_by_hand, grad_jvp_f, grad_grad_f]
)
def test_forward_mode_through_a_tangent_raises(tangent: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(NO_JVP_OF_JVP)):
        jvp(tangent, (X["q"],), (X["tq"],))


@pytest.mark.parametrize(
    "tangent", [jvp_f, jvp_f_along_k, tangent_by_hand, grad_jvp_f, grad_grad_f]
)
def test_the_backend_math_has_the_derivatives_that_the_messages_promise(
    tangent: Callable[[Tensor], Tensor],
) -> None:
    """The slope of the tangent along a line, in forward mode and by finite differences."""
    step = 1e-5
    with jvp_attn.backend("math"):
        (_, exact) = jvp(tangent, (X["q"],), (X["tq"],))
        ahead, behind = (tangent(X["q"] + h * X["tq"]) for h in (step, -step))
    assert exact.norm() > 0.1
    assert relative_error((ahead - behind) / (2 * step), exact) < 1e-7


@pytest.mark.parametrize("second", [grad_jvp_f, grad_grad_f])
def test_a_third_derivative_in_reverse_mode_raises(second: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(NO_THIRD)):
        grad(second)(X["q"])


def test_backward_through_a_tangent_raises_within_its_dual_level() -> None:
    """Within the level the gradient has a tangent, a third derivative; after it, none."""
    q = X["q"].clone().requires_grad_()
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(f(fwAD.make_dual(q, X["tq"]))).tangent
        with pytest.raises(NotImplementedError, match=re.escape(NO_THIRD)):
            torch.autograd.grad(tangent, q, retain_graph=True)
    (gradient,) = torch.autograd.grad(tangent, q)
    assert (gradient != 0).all()
