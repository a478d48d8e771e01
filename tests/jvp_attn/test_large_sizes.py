"""Sizes above 2³¹ work: tensors on the device `meta`, which hold no data, show the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from jvp_attn import flash_attn_jvp, flash_attn_varlen_jvp
from tests.jvp_attn.attention_cases import Case

HUGE = {
    "more than 2³¹ numbers": Case(1, 2**24, 2**24, 32, 8, 128, 128, dtype=torch.bfloat16),
    "more than 2³¹ keys": Case(1, 2, 2**31 + 1, 1, 1, 1, 1),
    "more than 2³¹ queries": Case(1, 2**31 + 1, 2, 1, 1, 1, 1),
    "more than 2³¹ batches": Case(2**31 + 1, 1, 1, 1, 1, 1, 1),
}


def on_meta(case: Case) -> dict[str, Tensor]:
    queries = (case.batch, case.seqlen_q, case.heads)
    keys = (case.batch, case.seqlen_k, case.heads_k)
    shapes = {
        "q": (*queries, case.head_dim),
        "k": (*keys, case.head_dim),
        "v": (*keys, case.head_dim_v),
    }
    return {x: torch.empty(y, dtype=case.dtype, device="meta") for x, y in shapes.items()}


@pytest.mark.parametrize("case", HUGE.values(), ids=HUGE.keys())
def test_sizes_may_be_above_2_to_the_31(case: Case) -> None:
    primals = [x.requires_grad_() for x in on_meta(case).values()]
    out, out_tangent = jvp(lambda *x: flash_attn_jvp(*x), tuple(primals), tuple(primals))
    assert out.shape == out_tangent.shape == (*primals[0].shape[:3], case.head_dim_v)
    gradients = torch.autograd.grad((out + out_tangent).sum(), primals)
    assert [g.shape for g in gradients] == [x.shape for x in primals]


@pytest.mark.parametrize("name", ["more than 2³¹ numbers", "more than 2³¹ keys"])
def test_packed_sequences_may_be_longer_than_2_to_the_31(name: str) -> None:
    q, k, v = (x[0] for x in on_meta(HUGE[name]).values())
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
    out = flash_attn_varlen_jvp(q, k, v, cu_seqlens, cu_seqlens, len(q), len(k))
    assert out.shape == (*q.shape[:2], v.shape[2])
