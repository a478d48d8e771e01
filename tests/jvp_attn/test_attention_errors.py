"""What does not fit, and what is not implemented, is refused by a message that helps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from attention_cases import Case
from torch import Tensor
from torch.func import grad, jvp

from jvp_attn import flash_attn_jvp, flash_attn_with_tangent

CASE = Case(2, 5, 7, heads=4, heads_k=2, head_dim=3, head_dim_v=6)


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# ----------------------------------------------------------------------------
# Arguments

ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # what is wrong: the arguments that are, the error, a part of its message
    "q is no tensor": ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor, got list"),
    "v is no tensor": ({"v": None}, TypeError, "v must be a torch.Tensor, got NoneType"),
    "q has 3 dimensions": (
        {"q": zeros(2, 5, 3)},
        ValueError,
        "q must have 4 dimensions (batch, seqlen, heads, head_dim), got shape (2, 5, 3)",
    ),
    "k has 5 dimensions": (
        {"k": zeros(1, 2, 7, 2, 3)},
        ValueError,
        "k must have 4 dimensions (batch, seqlen, heads, head_dim), got shape (1, 2, 7, 2, 3)",
    ),
    "k is sparse": (
        {"k": zeros(2, 7, 2, 3).to_sparse()},
        TypeError,
        "k must be a dense tensor, got layout torch.sparse_coo",
    ),
    "all are integers": (
        {x: y.long() for x, y in CASE.primals().items()},
        TypeError,
        "q has dtype torch.int64; supported are float16, bfloat16, float32, float64",
    ),
    "all are complex": (
        {x: y.to(torch.complex64) for x, y in CASE.primals().items()},
        TypeError,
        "q has dtype torch.complex64; supported are float16, bfloat16, float32, float64",
    ),
    "k has another dtype": (
        {"k": zeros(2, 7, 2, 3, dtype=torch.float32)},
        TypeError,
        "k has dtype torch.float32 but q has torch.float64; they must be the same",
    ),
    "v has another dtype": (
        {"v": zeros(2, 7, 2, 6, dtype=torch.bfloat16)},
        TypeError,
        "v has dtype torch.bfloat16 but q has torch.float64; they must be the same",
    ),
    "v is on another device": (
        {"v": zeros(2, 7, 2, 6, device="meta")},
        ValueError,
        "v is on meta but q is on cpu; they must be on one device",
    ),
    "k has another batch": (
        {"k": zeros(3, 7, 2, 3)},
        ValueError,
        "k has batch 3 but q has 2 (shapes (3, 7, 2, 3) and (2, 5, 4, 3))",
    ),
    "v has a batch of 1": ({"v": zeros(1, 7, 2, 6)}, ValueError, "v has batch 1 but q has 2"),
    "v has another seqlen than k": (
        {"v": zeros(2, 8, 2, 6)},
        ValueError,
        "k and v must agree in seqlen and heads, got shapes (2, 7, 2, 3), (2, 8, 2, 6)",
    ),
    "v has other heads than k": (
        {"v": zeros(2, 7, 4, 6)},
        ValueError,
        "k and v must agree in seqlen and heads, got shapes (2, 7, 2, 3), (2, 7, 4, 6)",
    ),
    "k has another head_dim": (
        {"k": zeros(2, 7, 2, 4)},
        ValueError,
        "k has head_dim 4 but q has 3; they must be the same",
    ),
    "heads that cannot be grouped": (
        {"q": zeros(2, 5, 3, 3)},
        ValueError,
        "q has 3 heads and k has 2: the heads of q must be a positive multiple of those of k and v",
    ),
    "more key heads than heads": (
        {"q": zeros(2, 5, 1, 3)},
        ValueError,
        "q has 1 heads and k has 2: the heads of q must be a positive multiple",
    ),
    "no heads": (
        {"q": zeros(2, 5, 0, 3)},
        ValueError,
        "q has 0 heads and k has 2: the heads of q must be a positive multiple",
    ),
    "no key heads": (
        {"k": zeros(2, 7, 0, 3), "v": zeros(2, 7, 0, 6)},
        ValueError,
        "q has 4 heads and k has 0: the heads of q must be a positive multiple",
    ),
    "head_dim 0": (
        {"q": zeros(2, 5, 4, 0), "k": zeros(2, 7, 2, 0)},
        ValueError,
        "q has head_dim 0; supported are 1 to 256",
    ),
    "head_dim 257": (
        {"q": zeros(2, 5, 4, 257), "k": zeros(2, 7, 2, 257)},
        ValueError,
        "q has head_dim 257; supported are 1 to 256",
    ),
    "head_dim_v 257": (
        {"v": zeros(2, 7, 2, 257)},
        ValueError,
        "v has head_dim 257; supported are 1 to 256",
    ),
    "a tensor as scale": (
        {"softmax_scale": torch.tensor(0.5)},
        TypeError,
        "softmax_scale must be a Python number or None, got Tensor",
    ),
    "a truth value as scale": (
        {"softmax_scale": True},
        TypeError,
        "softmax_scale must be a Python number or None, got bool",
    ),
    "NaN as scale": (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale must be finite, got nan",
    ),
    "infinity as scale": (
        {"softmax_scale": float("inf")},
        ValueError,
        "softmax_scale must be finite, got inf",
    ),
}
TANGENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tq is no tensor": ({"tq": 0.0}, TypeError, "tq must be a torch.Tensor or None, got float"),
    "tk has another dtype": (
        {"tk": zeros(2, 7, 2, 3, dtype=torch.float32)},
        TypeError,
        "tk has dtype torch.float32 but its primal has torch.float64; "
        "a tangent must have its primal's dtype",
    ),
    "tq could be broadcast": (
        {"tq": zeros(1, 5, 4, 3)},
        ValueError,
        "tq has shape (1, 5, 4, 3) but its primal has (2, 5, 4, 3); "
        "a tangent must have its primal's shape",
    ),
    "tv has the shape of tk": (
        {"tv": zeros(2, 7, 2, 3)},
        ValueError,
        "tv has shape (2, 7, 2, 3) but its primal has (2, 7, 2, 6)",
    ),
    "tv is on another device": (
        {"tv": zeros(2, 7, 2, 6, device="meta")},
        ValueError,
        "tv is on meta but its primal is on cpu; a tangent must be on its primal's device",
    ),
}


@pytest.mark.parametrize("function", [flash_attn_jvp, flash_attn_with_tangent])
@pytest.mark.parametrize(("wrong", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments_are_named(
    wrong: dict[str, Any], error: type[Exception], message: str, function: Any
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**{**CASE.primals(), **wrong})


@pytest.mark.parametrize(("wrong", "error", "message"), TANGENTS.values(), ids=TANGENTS.keys())
def test_wrong_tangents_are_named(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_with_tangent(**{**CASE.primals(), **wrong})


def test_options_cannot_be_given_by_position() -> None:
    with pytest.raises(TypeError, match="positional"):
        flash_attn_jvp(*CASE.primals().values(), 0.5)  # type: ignore[call-overload]


# ----------------------------------------------------------------------------
# Derivatives of third order, and of second order in forward mode: never silently zero

X = CASE.data()
NO_JVP_OF_JVP = "differentiate the tangent in reverse mode, with torch.func.grad or .backward()"
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
def test_forward_mode_through_a_tangent_is_refused(tangent: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(NO_JVP_OF_JVP)):
        jvp(tangent, (X["q"],), (X["tq"],))


@pytest.mark.parametrize("second", [grad_jvp_f, grad_grad_f])
def test_a_third_derivative_in_reverse_mode_is_refused(second: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(NO_THIRD)):
        grad(second)(X["q"])


def test_backward_through_a_tangent_is_refused_within_its_dual_level() -> None:
    """There the gradient would have a tangent, a third derivative; after the level it has none."""
    q = X["q"].clone().requires_grad_()
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(f(fwAD.make_dual(q, X["tq"]))).tangent
        with pytest.raises(NotImplementedError, match=re.escape(NO_THIRD)):
            torch.autograd.grad(tangent, q, retain_graph=True)
    (gradient,) = torch.autograd.grad(tangent, q)
    assert (gradient != 0).all()
