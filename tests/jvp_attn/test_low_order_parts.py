"""The low-order parts of the outputs reach the backward primitives through every transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import jvp

import jvp_attn
from jvp_attn import (
    AttentionOptions,
    FlashAttention,
    FlashAttentionJvp,
    flash_attn_jvp,
    flash_attn_with_tangent,
)
from jvp_attn.backends import meta, select, tiled
from jvp_attn.types import Inputs, JvpOutputs, Outputs, Tangents
from tests.jvp_attn.attention_cases import Case, assert_close, named
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.test_func_transforms import Derivative, over_derivatives

CASE = Case(seqlen_q=3, seqlen_k=2, head_dim=2, head_dim_v=1)
MASKED = replace(CASE, mask="additive", mask_dims=".h.k")


def low_order_part_of(x: Tensor) -> Tensor:
    """A recognisable tensor, different for each output."""
    return x / 4


class LowOrderChecker:
    """The backend `tiled` with made-up low-order parts; its backward checks that it gets them."""

    def __init__(self) -> None:
        self.requested: list[bool] = []
        self.checked = 0

    def check(self, x: Tensor, low: Tensor | None) -> None:
        assert low is not None
        assert torch.equal(low, low_order_part_of(x))
        self.checked += 1

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        out, lse, *_ = tiled.forward(inputs, options)
        self.requested.append(options.return_lo)
        return Outputs(out, lse, low_order_part_of(out), low_order_part_of(lse))

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        out, lse, tout, mu, *_ = tiled.forward_jvp(inputs, tangents, options)
        self.requested.append(options.return_lo)
        return JvpOutputs(out, lse, tout, mu, *map(low_order_part_of, (out, tout, lse)))

    def backward(self, inputs: Inputs, outputs: Outputs, *others: Any) -> Any:
        self.check(outputs.out, outputs.out_lo)
        self.check(outputs.lse, outputs.lse_lo)
        return tiled.backward(inputs, outputs, *others)

    def jvp_backward(
        self, inputs: Inputs, tangents: Tangents, outputs: JvpOutputs, *others: Any
    ) -> Any:
        self.check(outputs.out, outputs.out_lo)
        self.check(outputs.tout, outputs.tout_lo)
        self.check(outputs.lse, outputs.lse_lo)
        return tiled.jvp_backward(inputs, tangents, outputs, *others)


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Iterator[LowOrderChecker]:
    backend = LowOrderChecker()
    monkeypatch.setitem(select._BACKENDS, "checking", select._Backend(lambda: backend, meta=meta))
    with jvp_attn.backend("checking"):
        yield backend


@pytest.mark.parametrize("case", [CASE, MASKED], ids=["full", "masked"])
@over_derivatives
def test_low_order_parts_reach_the_backward_with_their_outputs(
    derivative: Derivative, case: Case, checking: LowOrderChecker
) -> None:
    mask = case.primals().get("attn_mask")
    x, t = case.point_and_direction()
    ours = derivative(lambda *x: case.ours(*x, mask), x, t)
    has_backward = "grad" in derivative.__name__ or "rev" in derivative.__name__
    assert checking.checked or not has_backward
    assert_close(named(ours), named(derivative(lambda *x: case.naive(*x, mask), x, t)))


def test_low_order_parts_reach_the_backward_if_the_tangent_is_unused(
    checking: LowOrderChecker,
) -> None:
    x = CASE.data()
    q = x["q"].requires_grad_()
    out, _ = flash_attn_with_tangent(**x)
    torch.autograd.grad(out.sum(), q)
    assert checking.checked == 2  # out_lo and lse_lo


def test_low_order_parts_reach_the_backward_of_dual_numbers(checking: LowOrderChecker) -> None:
    x = CASE.data()
    q = x["q"].requires_grad_()
    with fwAD.dual_level():
        out = flash_attn_jvp(fwAD.make_dual(q, x["tq"]), x["k"], x["v"])
        torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    assert checking.checked


def test_low_order_parts_have_no_derivative(checking: LowOrderChecker) -> None:
    options = AttentionOptions(1.0, backend="checking")
    x = [y.requires_grad_() for y in CASE.data().values()]
    inputs = (*x[:3], None, None, None, None)
    for outputs, count in (
        (FlashAttention.apply(*inputs, options), 2),
        (FlashAttentionJvp.apply(*inputs, *x[3:], None, options), 4),
    ):
        requires_grad = [y.requires_grad for y in outputs]
        assert requires_grad == count * [True] + (len(outputs) - count) * [False]


# ----------------------------------------------------------------------------
# They are requested if a backward pass may follow


def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, tq: Tensor) -> Any:
    return flash_attn_jvp(q, k, v, attn_mask=attn_mask)


def under_jvp(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, tq: Tensor) -> Any:
    return jvp(lambda q: flash_attn_jvp(q, k, v, attn_mask=attn_mask), (q,), (tq,))


def by_hand(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, tq: Tensor) -> Any:
    return flash_attn_with_tangent(q, k, v, tq, attn_mask=attn_mask)


WITH_TANGENT_OF_Q = replace(MASKED, with_tangent="q")


@pytest.mark.parametrize("attention", [plain, under_jvp, by_hand])
@pytest.mark.parametrize("requires_grad", ["q", "v", "attn_mask"])
def test_low_order_parts_are_requested_if_an_input_requires_grad(
    attention: Callable[..., Any], requires_grad: str, checking: LowOrderChecker
) -> None:
    data = WITH_TANGENT_OF_Q.data()
    data[requires_grad].requires_grad_()
    attention(**data)
    assert checking.requested == [True]


@pytest.mark.parametrize("attention", [plain, under_jvp, by_hand])
def test_low_order_parts_are_not_requested_under_no_grad(
    attention: Callable[..., Any], checking: LowOrderChecker
) -> None:
    data = WITH_TANGENT_OF_Q.data()
    data["q"].requires_grad_()
    with torch.no_grad():
        attention(**data)
    assert checking.requested == [False]


def test_low_order_parts_are_not_requested_if_nothing_requires_grad(
    checking: LowOrderChecker,
) -> None:
    data = WITH_TANGENT_OF_Q.data()
    plain(**data)
    by_hand(**data)
    assert checking.requested == [False, False]


def test_low_order_parts_are_requested_if_only_the_tangent_requires_grad(
    checking: LowOrderChecker,
) -> None:
    data = WITH_TANGENT_OF_Q.data()
    data["tq"].requires_grad_()
    by_hand(**data)
    assert checking.requested == [True]


def test_low_order_parts_of_packed_sequences_are_requested_if_an_input_requires_grad(
    checking: LowOrderChecker,
) -> None:
    case = PackedCase()
    data = case.primals()
    case.ours(**data)
    data["v"].requires_grad_()
    case.ours(**data)
    assert checking.requested == [False, True]


def test_func_grad_under_no_grad_requests_low_order_parts(checking: LowOrderChecker) -> None:
    data = Case().primals()
    with torch.no_grad():
        torch.func.grad(lambda q: flash_attn_jvp(q, data["k"], data["v"]).sum())(data["q"])
    assert checking.requested == [True]
