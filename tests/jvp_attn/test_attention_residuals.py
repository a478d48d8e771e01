"""What rounding took from the outputs reaches the backward maps, through every transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from attention_cases import Case, assert_close, named
from test_attention_func_transforms import Derivative, over_derivatives
from torch import Tensor
from torch.func import jvp

import jvp_attn
from jvp_attn import (
    AttentionOptions,
    FlashAttention,
    FlashAttentionTangent,
    backends,
    blockwise,
    flash_attn_jvp,
    flash_attn_with_tangent,
)

CASE = Case(seqlen_q=3, seqlen_k=2, head_dim=2, head_dim_v=1)


def residual_of(x: Tensor) -> Tensor:
    """Recognisable, and different for each output."""
    return x.cos()


class Checking:
    """Blockwise, but with residuals, and what comes back is compared with them."""

    def __init__(self) -> None:
        self.wanted: list[bool] = []
        self.checked = 0

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        assert residual is not None
        assert torch.equal(residual, residual_of(x))
        self.checked += 1

    def forward(self, *inputs: Any) -> Any:
        out, lse, _ = blockwise.forward(*inputs)
        self.wanted.append(inputs[-1].residuals)
        return out, lse, residual_of(out)

    def forward_tangent(self, *inputs: Any) -> Any:
        out, lse, tout, mu, *_ = blockwise.forward_tangent(*inputs)
        self.wanted.append(inputs[-1].residuals)
        return out, lse, tout, mu, residual_of(out), residual_of(tout)

    def backward(self, *inputs: Any) -> Any:
        _q, _k, _v, out, _lse, out_residual, *_ = inputs
        self.check(out, out_residual)
        return blockwise.backward(*inputs)

    def tangent_backward(self, *inputs: Any) -> Any:
        out, _lse, tout, _mu, out_residual, tout_residual = inputs[6:12]
        self.check(out, out_residual)
        self.check(tout, tout_residual)
        return blockwise.tangent_backward(*inputs)


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checking]:
    maps = Checking()
    monkeypatch.setitem(backends._MAPS, "checking", maps)
    with jvp_attn.backend("checking"):
        yield maps


@over_derivatives
def test_residuals_accompany_their_outputs(derivative: Derivative, checking: Checking) -> None:
    x, t = CASE.point_and_direction()
    ours = derivative(CASE.ours, x, t)
    has_backward = "grad" in derivative.__name__ or "rev" in derivative.__name__
    assert checking.checked or not has_backward
    assert_close(named(ours), named(derivative(CASE.naive, x, t)))


def test_residuals_accompany_an_output_whose_tangent_is_not_used(checking: Checking) -> None:
    x = CASE.data()
    q = x["q"].requires_grad_()
    out, _ = flash_attn_with_tangent(**x)
    torch.autograd.grad(out.sum(), q)
    assert checking.checked == 1


def test_residuals_accompany_dual_numbers(checking: Checking) -> None:
    x = CASE.data()
    q = x["q"].requires_grad_()
    with fwAD.dual_level():
        out = flash_attn_jvp(fwAD.make_dual(q, x["tq"]), x["k"], x["v"])
        torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    assert checking.checked


def test_residuals_have_no_derivative() -> None:
    maps = Checking()
    options = AttentionOptions(1.0, backend="checking")
    x = [y.requires_grad_() for y in CASE.data().values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._MAPS, "checking", maps)
        for outputs, count in (
            (FlashAttention.apply(*x[:3], options), 2),
            (FlashAttentionTangent.apply(*x, options), 4),
        ):
            requires_grad = [y.requires_grad for y in outputs]
            assert requires_grad == count * [True] + (len(outputs) - count) * [False]


# ----------------------------------------------------------------------------
# They are asked for where a backward pass may follow


def plain(q: Tensor, k: Tensor, v: Tensor, tq: Tensor) -> Any:
    return flash_attn_jvp(q, k, v)


def under_jvp(q: Tensor, k: Tensor, v: Tensor, tq: Tensor) -> Any:
    return jvp(lambda q: flash_attn_jvp(q, k, v), (q,), (tq,))


def by_hand(q: Tensor, k: Tensor, v: Tensor, tq: Tensor) -> Any:
    return flash_attn_with_tangent(q, k, v, tq)


@pytest.mark.parametrize("attention", [plain, under_jvp, by_hand])
@pytest.mark.parametrize("requires_grad", ["q", "v"])
def test_residuals_are_wanted_where_an_input_requires_grad(
    attention: Callable[..., Any], requires_grad: str, checking: Checking
) -> None:
    data = Case(with_tangent="q").data()
    data[requires_grad].requires_grad_()
    attention(**data)
    assert checking.wanted == [True]


@pytest.mark.parametrize("attention", [plain, under_jvp, by_hand])
def test_no_residuals_are_wanted_without_grad(
    attention: Callable[..., Any], checking: Checking
) -> None:
    data = Case(with_tangent="q").data()
    data["q"].requires_grad_()
    with torch.no_grad():
        attention(**data)
    assert checking.wanted == [False]


def test_no_residuals_are_wanted_where_nothing_requires_grad(checking: Checking) -> None:
    data = Case(with_tangent="q").data()
    plain(**data)
    by_hand(**data)
    assert checking.wanted == [False, False]


def test_residuals_are_wanted_where_only_the_tangent_requires_grad(checking: Checking) -> None:
    data = Case(with_tangent="q").data()
    data["tq"].requires_grad_()
    by_hand(**data)
    assert checking.wanted == [True]


def test_a_gradient_within_no_grad_wants_residuals(checking: Checking) -> None:
    data = Case().primals()
    with torch.no_grad():
        torch.func.grad(lambda q: flash_attn_jvp(q, data["k"], data["v"]).sum())(data["q"])
    assert checking.wanted == [True]
