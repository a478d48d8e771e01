"""Inputs may have any strides and are never modified; a tangent has the strides of its primal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import vmap

from jvp_attn import flash_attn_with_tangent
from tests.jvp_attn.attention_cases import (
    Case,
    assert_close,
    outputs_and_gradients,
    randn,
    small_tiles,
    with_tangents,
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim before heads": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other number": lambda x: torch.stack([x, x], -1)[..., 0],
    "the first half of a longer sequence": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one batch for all": lambda x: x[:1].expand(x.shape),
    "one head for all": lambda x: x[:, :, :1].expand(x.shape),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@over_layouts
def test_the_layout_of_the_inputs_changes_no_result(layout: Callable[[Tensor], Tensor]) -> None:
    case = Case(causal=True)
    data = {name: layout(x) for name, x in case.data().items()}
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in data.items()}
    with small_tiles(scores=1, rows=4):
        assert_close(
            outputs_and_gradients(case.ours, data), outputs_and_gradients(case.ours, dense)
        )


def test_q_k_and_v_may_be_views_of_one_tensor() -> None:
    case = Case(seqlen_q=5, seqlen_k=5, heads=2, heads_k=2, head_dim=3, head_dim_v=3)
    qkv = randn(2, 5, 3, 2, 3, seed="qkv").requires_grad_()
    ours, naive = (
        torch.autograd.grad(f(*qkv.unbind(2))[0].square().sum(), qkv)[0]
        for f in (case.ours, case.naive)
    )
    assert_close({"qkv": ours}, {"qkv": naive})


@over_layouts
def test_inputs_are_never_modified(layout: Callable[[Tensor], Tensor]) -> None:
    case = Case(causal=True, heads=2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        data = {name: layout(x.to(dtype)) for name, x in case.data().items()}
        before = {name: x.clone() for name, x in data.items()}
        outputs_and_gradients(case.ours, data)
        assert_close(data, before, tolerance=0)
        assert all(x._version == 0 for x in data.values())


# ----------------------------------------------------------------------------
# Torch assumes in later operations that a tangent has the strides of its primal.


def assert_same_layout(tangent: Tensor, primal: Tensor) -> None:
    assert tangent.shape == primal.shape
    assert tangent.dtype == primal.dtype
    assert tangent.stride() == primal.stride()


@over_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("with_tangent", ["qkv", "q", "v"])
def test_a_tangent_of_jvp_has_the_strides_of_its_primal(
    with_tangent: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    case = Case(with_tangent=with_tangent)
    outputs = with_tangents(case.ours, {n: layout(x.to(dtype)) for n, x in case.data().items()})
    assert outputs["out"].dtype == dtype
    assert_same_layout(outputs["out_tangent"], outputs["out"])
    assert_same_layout(outputs["mu"], outputs["lse"])


@over_layouts
def test_a_tangent_of_flash_attn_with_tangent_has_the_strides_of_its_primal(
    layout: Callable[[Tensor], Tensor],
) -> None:
    data = {name: layout(x) for name, x in Case().data().items()}
    out, out_tangent, lse, mu = flash_attn_with_tangent(**data, return_lse=True)
    assert_same_layout(out_tangent, out)
    assert_same_layout(mu, lse)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tangent_of_a_dual_number_has_the_strides_of_its_primal(requires_grad: bool) -> None:
    case = Case()
    x = case.data()
    with fwAD.dual_level():
        q = fwAD.make_dual(x["q"].requires_grad_(requires_grad), x["tq"])
        for output in case.ours(q, x["k"], x["v"]):
            dual = fwAD.unpack_dual(output)
            assert_same_layout(dual.tangent, dual.primal)


def test_a_tangent_of_vmap_of_jvp_has_the_strides_of_its_primal() -> None:
    case = Case()
    x = {name: torch.stack([y, y]) for name, y in case.data().items()}
    outputs = vmap(lambda x: with_tangents(case.ours, x))(x)
    assert_same_layout(outputs["out_tangent"], outputs["out"])
    assert_same_layout(outputs["mu"], outputs["lse"])
