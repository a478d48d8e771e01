"""Bad packed sequences raise an error that says what is wrong and what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import jvp_attn
from jvp_attn import flash_attn_varlen_jvp
from tests.jvp_attn.bad_arguments import (
    CAUSAL,
    DTYPES,
    MULTIPLE,
    PACKED,
    SCALES,
    BadCall,
    Table,
    int32,
    over_backends,
    over_bad_calls,
    zeros,
)

PACKING: Table = {
    "q has a batch": (
        {"q": zeros(1, 8, 4, 3)},
        ValueError,
        "q must have 3 dimensions (total, heads, head_dim)",
        "(1, 8, 4, 3)",
    ),
    "v is not a tensor": ({"v": None}, TypeError, "v must be a torch.Tensor", "NoneType"),
    "v is longer than k": (
        {"v": zeros(11, 2, 6)},
        ValueError,
        "k and v must agree in seqlen and heads",
        "(10, 2, 3), (11, 2, 6)",
    ),
    "all are integers": (
        {x: PACKED[x].int() for x in ("q", "k", "v")},
        TypeError,
        "q has dtype torch.int32",
        DTYPES,
    ),
    "k has another dtype": (
        {"k": zeros(10, 2, 3, dtype=torch.float16)},
        TypeError,
        "k has dtype torch.float16 but q has torch.float64",
    ),
    "v is on another device": (
        {"v": zeros(10, 2, 6, device="meta")},
        ValueError,
        "v is on meta but q is on cpu",
    ),
    "heads that cannot be grouped": (
        {"q": zeros(8, 3, 3)},
        ValueError,
        "q has 3 heads and k has 2",
        MULTIPLE,
    ),
    "no key heads": (
        {"k": zeros(10, 0, 3), "v": zeros(10, 0, 6)},
        ValueError,
        "q has 4 heads and k has 0",
        MULTIPLE,
    ),
    "cu_seqlens_q is a list": (
        {"cu_seqlens_q": [0, 3, 8]},
        TypeError,
        "cu_seqlens_q must be a torch.Tensor",
        "list",
    ),
    "cu_seqlens_k is None": (
        {"cu_seqlens_k": None},
        TypeError,
        "cu_seqlens_k must be a torch.Tensor",
        "NoneType",
    ),
    "cu_seqlens_q is int64": (
        {"cu_seqlens_q": int32(0, 3, 8).long()},
        TypeError,
        "cu_seqlens_q has dtype torch.int64",
        "int32",
    ),
    "cu_seqlens_k is floating": (
        {"cu_seqlens_k": int32(0, 4, 10).float()},
        TypeError,
        "cu_seqlens_k has dtype torch.float32",
        "int32",
    ),
    "cu_seqlens_q has 2 dimensions": (
        {"cu_seqlens_q": int32(0, 3, 8)[None]},
        ValueError,
        "cu_seqlens_q must have shape (sequences + 1,)",
        "(1, 3)",
    ),
    "cu_seqlens_k has no dimension": (
        {"cu_seqlens_k": int32(0)[0]},
        ValueError,
        "cu_seqlens_k must have shape (sequences + 1,)",
        "()",
    ),
    "cu_seqlens_q is empty": (
        {"cu_seqlens_q": int32()},
        ValueError,
        "cu_seqlens_q must have shape (sequences + 1,)",
        "(0,)",
    ),
    "cu_seqlens_k is on another device": (
        {"cu_seqlens_k": int32(0, 4, 10).to("meta")},
        ValueError,
        "cu_seqlens_k is on meta but q is on cpu",
    ),
    "different numbers of sequences": (
        {"cu_seqlens_k": int32(0, 4, 7, 10)},
        ValueError,
        "cu_seqlens_q",
        "2 sequences",
        "cu_seqlens_k",
        "3",
        "must be as many",
    ),
    "cu_seqlens_q does not start with 0": (
        {"cu_seqlens_q": int32(1, 3, 8)},
        ValueError,
        "cu_seqlens_q must start with 0",
        "[1, 3, 8]",
    ),
    "cu_seqlens_k decreases": (
        {"cu_seqlens_k": int32(0, 6, 4)},
        ValueError,
        "cu_seqlens_k must not decrease",
        "[0, 6, 4]",
    ),
    "cu_seqlens_q is negative": (
        {"cu_seqlens_q": int32(0, -3, 2)},
        ValueError,
        "cu_seqlens_q must not decrease",
        "[0, -3, 2]",
    ),
    "cu_seqlens_k ends beyond k": (
        {"cu_seqlens_k": int32(0, 5, 11)},
        ValueError,
        "cu_seqlens_k must not end beyond the 10 rows of k",
        "[0, 5, 11]",
    ),
    "cu_seqlens_q ends beyond k and comes back": (
        {"cu_seqlens_q": int32(0, 11, 8), "max_seqlen_q": 11},
        ValueError,
        "cu_seqlens_q must not decrease",
        "[0, 11, 8]",
    ),
    "max_seqlen_q is too small": (
        {"max_seqlen_q": 4},
        ValueError,
        "max_seqlen_q is 4",
        "no sequence may be longer",
        "[0, 3, 8]",
    ),
    "max_seqlen_k is too small": (
        {"max_seqlen_k": 0},
        ValueError,
        "max_seqlen_k is 0",
        "no sequence may be longer",
        "[0, 4, 10]",
    ),
    "max_seqlen_k is negative": (
        {"max_seqlen_k": -6},
        ValueError,
        "max_seqlen_k is -6",
        "must not be negative",
    ),
    "max_seqlen_q is a float": (
        {"max_seqlen_q": 5.0},
        TypeError,
        "max_seqlen_q must be an integer",
        "float",
    ),
    "max_seqlen_q is a tensor": (
        {"max_seqlen_q": torch.tensor(5)},
        TypeError,
        "max_seqlen_q must be an integer",
        "Tensor",
    ),
    "max_seqlen_k is a bool": (
        {"max_seqlen_k": True},
        TypeError,
        "max_seqlen_k must be an integer",
        "bool",
    ),
    "max_seqlen_k is None": (
        {"max_seqlen_k": None},
        TypeError,
        "max_seqlen_k must be an integer",
        "NoneType",
    ),
}


@over_backends
@over_bad_calls(PACKED, {flash_attn_varlen_jvp: PACKING | SCALES | CAUSAL})
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)


@over_backends
def test_good_arguments_raise_nothing(backend: str) -> None:
    with jvp_attn.backend(backend):
        flash_attn_varlen_jvp(**PACKED)


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_vmap_over_cu_seqlens_raises(which: str) -> None:
    def attention(cu_seqlens: Tensor) -> Tensor:
        return flash_attn_varlen_jvp(**{**PACKED, which: cu_seqlens})

    with pytest.raises(ValueError, match=r"vmap over cu_seqlens_q or cu_seqlens_k .* one call"):
        vmap(attention)(torch.stack([PACKED[which], PACKED[which]]))
