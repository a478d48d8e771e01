"""What does not fit, and what is not implemented, is refused by a message that helps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, jvp, vmap

import jvp_attn
from jvp_attn import (
    Causal,
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
    scaled_dot_product_attention,
)
from tests.jvp_attn.attention_cases import BACKENDS, Case
from tests.jvp_attn.packed_cases import PackedCase


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ends(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# What is wrong: the arguments that are, the error, and parts of its message, which are together
# the name of the argument, what was given and what is allowed.
Table = dict[str, tuple[Any, ...]]

# ----------------------------------------------------------------------------
# flash_attn_jvp, flash_attn_with_tangent

DENSE = Case(2, 5, 7, heads=4, heads_k=2, head_dim=3, head_dim_v=6).primals()
DIMENSIONS = "must have 4 dimensions (batch, seqlen, heads, head_dim)"
DTYPES = "supported are float16, bfloat16, float32, float64"
POSITIVE_MULTIPLE = "the heads of q must be a positive multiple of those of k and v"

TENSORS: Table = {
    "q is no tensor": ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor", "list"),
    "v is no tensor": ({"v": None}, TypeError, "v must be a torch.Tensor", "NoneType"),
    "q has 3 dimensions": ({"q": zeros(2, 5, 3)}, ValueError, "q " + DIMENSIONS, "(2, 5, 3)"),
    "k has 5 dimensions": (
        {"k": zeros(1, 2, 7, 2, 3)},
        ValueError,
        "k " + DIMENSIONS,
        "(1, 2, 7, 2, 3)",
    ),
    "v is a number": ({"v": zeros()}, ValueError, "v " + DIMENSIONS, "()"),
    "k is sparse": (
        {"k": zeros(2, 7, 2, 3).to_sparse()},
        TypeError,
        "k must be a dense tensor",
        "torch.sparse_coo",
    ),
    "q is jagged": (
        {"q": torch.nested.nested_tensor(2 * [zeros(5, 4, 3)], layout=torch.jagged)},
        TypeError,
        "q must be a dense tensor",
        "torch.jagged",
    ),
    "q is nested": (
        {"q": torch.nested.nested_tensor(2 * [zeros(5, 4, 3)])},
        TypeError,
        "q",
        "nested",
        "flash_attn_varlen_jvp",
    ),
    "all are integers": (
        {x: y.long() for x, y in DENSE.items()},
        TypeError,
        "q has dtype torch.int64",
        DTYPES,
    ),
    "all are truth values": (
        {x: y.bool() for x, y in DENSE.items()},
        TypeError,
        "q has dtype torch.bool",
        DTYPES,
    ),
    "all are complex": (
        {x: y.to(torch.complex64) for x, y in DENSE.items()},
        TypeError,
        "q has dtype torch.complex64",
        DTYPES,
    ),
    "k has another dtype": (
        {"k": zeros(2, 7, 2, 3, dtype=torch.float32)},
        TypeError,
        "k has dtype torch.float32 but q has torch.float64",
        "must be the same",
    ),
    "v has another dtype": (
        {"v": zeros(2, 7, 2, 6, dtype=torch.bfloat16)},
        TypeError,
        "v has dtype torch.bfloat16 but q has torch.float64",
        "must be the same",
    ),
    "k is on another device": (
        {"k": zeros(2, 7, 2, 3, device="meta")},
        ValueError,
        "k is on meta but q is on cpu",
        "must be on one device",
    ),
    "v is on another device": (
        {"v": zeros(2, 7, 2, 6, device="meta")},
        ValueError,
        "v is on meta but q is on cpu",
        "must be on one device",
    ),
    "k has another batch": (
        {"k": zeros(3, 7, 2, 3)},
        ValueError,
        "k has batch 3 but q has 2",
        "(3, 7, 2, 3)",
        "(2, 5, 4, 3)",
    ),
    "v has a batch of 1": ({"v": zeros(1, 7, 2, 6)}, ValueError, "v has batch 1 but q has 2"),
    "v has another seqlen than k": (
        {"v": zeros(2, 8, 2, 6)},
        ValueError,
        "k and v must agree in seqlen and heads",
        "(2, 7, 2, 3), (2, 8, 2, 6)",
    ),
    "v has other heads than k": (
        {"v": zeros(2, 7, 4, 6)},
        ValueError,
        "k and v must agree in seqlen and heads",
        "(2, 7, 2, 3), (2, 7, 4, 6)",
    ),
    "k has another head_dim": (
        {"k": zeros(2, 7, 2, 4)},
        ValueError,
        "k has head_dim 4 but q has 3",
        "must be the same",
    ),
    "heads that cannot be grouped": (
        {"q": zeros(2, 5, 3, 3)},
        ValueError,
        "q has 3 heads and k has 2",
        POSITIVE_MULTIPLE,
    ),
    "more key heads than heads": (
        {"q": zeros(2, 5, 1, 3)},
        ValueError,
        "q has 1 heads and k has 2",
        POSITIVE_MULTIPLE,
    ),
    "no heads": (
        {"q": zeros(2, 5, 0, 3)},
        ValueError,
        "q has 0 heads and k has 2",
        POSITIVE_MULTIPLE,
    ),
    "no key heads": (
        {"k": zeros(2, 7, 0, 3), "v": zeros(2, 7, 0, 6)},
        ValueError,
        "q has 4 heads and k has 0",
        POSITIVE_MULTIPLE,
    ),
    "head_dim 0": (
        {"q": zeros(2, 5, 4, 0), "k": zeros(2, 7, 2, 0)},
        ValueError,
        "q has head_dim 0; supported are 1 to 256",
    ),
    "head_dim_v 0": (
        {"v": zeros(2, 7, 2, 0)},
        ValueError,
        "v has head_dim 0; supported are 1 to 256",
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
}
SCALES: Table = {
    "a tensor as scale": (
        {"softmax_scale": torch.tensor(0.5)},
        TypeError,
        "softmax_scale must be a Python number or None",
        "Tensor",
        "multiplied into q",
    ),
    "a truth value as scale": (
        {"softmax_scale": True},
        TypeError,
        "softmax_scale must be a Python number or None",
        "bool",
    ),
    "NaN as scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale", "finite", "nan"),
    "infinity as scale": (
        {"softmax_scale": float("inf")},
        ValueError,
        "softmax_scale must be finite",
        "inf",
    ),
}
CAUSAL: Table = {
    "causal is an alignment": (
        {"causal": Causal.TOP_LEFT},
        TypeError,
        "causal must be True or False",
        "TOP_LEFT",
        "scaled_dot_product_attention",
    ),
    "causal is a word": ({"causal": "no"}, TypeError, "causal must be True or False", "no"),
    "causal is a tensor": (
        {"causal": zeros(5, 7).bool()},
        TypeError,
        "causal must be True or False",
        "Tensor",
    ),
}
MASKS: Table = {
    "the mask is no tensor": (
        {"attn_mask": [[True]]},
        TypeError,
        "attn_mask must be a torch.Tensor or None",
        "list",
    ),
    "the mask has 5 dimensions": (
        {"attn_mask": zeros(1, 2, 4, 5, 7)},
        ValueError,
        "attn_mask has shape (1, 2, 4, 5, 7)",
        "(batch, heads, seqlen_q, seqlen_k) = (2, 4, 5, 7)",
    ),
    "the mask is too long": (
        {"attn_mask": zeros(5, 8)},
        ValueError,
        "attn_mask has shape (5, 8)",
        "(2, 4, 5, 7)",
    ),
    "the mask is of keys and queries": (
        {"attn_mask": zeros(7, 5)},
        ValueError,
        "attn_mask has shape (7, 5)",
        "(2, 4, 5, 7)",
    ),
    "the mask has a batch but no heads": (
        {"attn_mask": zeros(2, 5, 7)},
        ValueError,
        "attn_mask has shape (2, 5, 7)",
        "(2, 4, 5, 7)",
    ),
    "the mask has the heads of k": (
        {"attn_mask": zeros(2, 2, 5, 7)},
        ValueError,
        "attn_mask has shape (2, 2, 5, 7)",
        "(2, 4, 5, 7)",
    ),
    "the mask is empty": (
        {"attn_mask": zeros(5, 0)},
        ValueError,
        "attn_mask has shape (5, 0)",
        "(2, 4, 5, 7)",
    ),
    "the mask is of integers": (
        {"attn_mask": zeros(5, 7, dtype=torch.int64)},
        TypeError,
        "attn_mask has dtype torch.int64",
        "q has torch.float64",
        "bool, float64",
    ),
    "the mask is of bytes": (
        {"attn_mask": zeros(5, 7, dtype=torch.uint8)},
        TypeError,
        "attn_mask has dtype torch.uint8",
        "bool, float64",
    ),
    "the mask is coarser than q": (
        {"attn_mask": zeros(5, 7, dtype=torch.float32)},
        TypeError,
        "attn_mask has dtype torch.float32",
        "q has torch.float64",
        "bool, float64",
    ),
    "the mask is finer than q": (
        {**{x: y.float() for x, y in DENSE.items()}, "attn_mask": zeros(5, 7)},
        TypeError,
        "attn_mask has dtype torch.float64",
        "q has torch.float32",
        "bool, float32",
    ),
    "the mask is of the other half precision": (
        {
            **{x: y.half() for x, y in DENSE.items()},
            "attn_mask": zeros(5, 7, dtype=torch.bfloat16),
        },
        TypeError,
        "attn_mask has dtype torch.bfloat16",
        "q has torch.float16",
        "bool, float16, float32",
    ),
    "the mask is on another device": (
        {"attn_mask": zeros(5, 7, device="meta")},
        ValueError,
        "attn_mask is on meta but q is on cpu",
        "must be on one device",
    ),
    "the mask is sparse": (
        {"attn_mask": zeros(5, 7).to_sparse()},
        TypeError,
        "attn_mask must be a dense tensor",
        "torch.sparse_coo",
    ),
}
PRIMALS_SHAPE = "a tangent must have its primal's shape"
TANGENTS: Table = {
    "tq is no tensor": ({"tq": 0.0}, TypeError, "tq must be a torch.Tensor or None", "float"),
    "tq could be broadcast": (
        {"tq": zeros(1, 5, 4, 3)},
        ValueError,
        "tq has shape (1, 5, 4, 3) but its primal has (2, 5, 4, 3)",
        PRIMALS_SHAPE,
    ),
    "tk has another dtype": (
        {"tk": zeros(2, 7, 2, 3, dtype=torch.float32)},
        TypeError,
        "tk has dtype torch.float32 but its primal has torch.float64",
        "a tangent must have its primal's dtype",
    ),
    "tv has the shape of tk": (
        {"tv": zeros(2, 7, 2, 3)},
        ValueError,
        "tv has shape (2, 7, 2, 3) but its primal has (2, 7, 2, 6)",
        PRIMALS_SHAPE,
    ),
    "tv is on another device": (
        {"tv": zeros(2, 7, 2, 6, device="meta")},
        ValueError,
        "tv is on meta but its primal is on cpu",
        "a tangent must be on its primal's device",
    ),
    "tk is sparse": (
        {"tk": zeros(2, 7, 2, 3).to_sparse()},
        TypeError,
        "tk must be a dense tensor",
        "torch.sparse_coo",
    ),
    "a tangent of no mask": (
        {"tattn_mask": zeros(5, 7)},
        ValueError,
        "tattn_mask is given but attn_mask is not",
    ),
    "a tangent of a boolean mask": (
        {"attn_mask": zeros(5, 7).bool(), "tattn_mask": zeros(5, 7)},
        TypeError,
        "tattn_mask is given but attn_mask is boolean",
    ),
    "the tangent of a mask is no tensor": (
        {"attn_mask": zeros(5, 7), "tattn_mask": 1.0},
        TypeError,
        "tattn_mask must be a torch.Tensor or None",
        "float",
    ),
    "the tangent of a mask could be broadcast": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(7)},
        ValueError,
        "tattn_mask has shape (7,) but its primal has (5, 7)",
        PRIMALS_SHAPE,
    ),
    "the tangent of a mask has another dtype": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(5, 7, dtype=torch.float32)},
        TypeError,
        "tattn_mask has dtype torch.float32 but its primal has torch.float64",
    ),
    "the tangent of a mask is on another device": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(5, 7, device="meta")},
        ValueError,
        "tattn_mask is on meta but its primal is on cpu",
    ),
}

# ----------------------------------------------------------------------------
# flash_attn_varlen_jvp

PACKED = {
    **PackedCase((3, 5), (4, 6)).primals(),
    "cu_seqlens_q": ends(0, 3, 8),
    "cu_seqlens_k": ends(0, 4, 10),
    "max_seqlen_q": 5,
    "max_seqlen_k": 6,
}
PACKING: Table = {
    "q has a batch": (
        {"q": zeros(1, 8, 4, 3)},
        ValueError,
        "q must have 3 dimensions (total, heads, head_dim)",
        "(1, 8, 4, 3)",
    ),
    "v is no tensor": ({"v": None}, TypeError, "v must be a torch.Tensor", "NoneType"),
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
        POSITIVE_MULTIPLE,
    ),
    "head_dim 257": (
        {"q": zeros(8, 4, 257), "k": zeros(10, 2, 257)},
        ValueError,
        "q has head_dim 257; supported are 1 to 256",
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
        {"cu_seqlens_q": ends(0, 3, 8).long()},
        TypeError,
        "cu_seqlens_q has dtype torch.int64",
        "int32",
    ),
    "cu_seqlens_k is floating": (
        {"cu_seqlens_k": ends(0, 4, 10).float()},
        TypeError,
        "cu_seqlens_k has dtype torch.float32",
        "int32",
    ),
    "cu_seqlens_q has 2 dimensions": (
        {"cu_seqlens_q": ends(0, 3, 8)[None]},
        ValueError,
        "cu_seqlens_q must have shape (sequences + 1,)",
        "(1, 3)",
    ),
    "cu_seqlens_k has none": (
        {"cu_seqlens_k": ends(0)[0]},
        ValueError,
        "cu_seqlens_k must have shape (sequences + 1,)",
        "()",
    ),
    "cu_seqlens_q is empty": (
        {"cu_seqlens_q": ends()},
        ValueError,
        "cu_seqlens_q must have shape (sequences + 1,)",
        "(0,)",
    ),
    "cu_seqlens_k is on another device": (
        {"cu_seqlens_k": ends(0, 4, 10).to("meta")},
        ValueError,
        "cu_seqlens_k is on meta but q is on cpu",
    ),
    "different numbers of sequences": (
        {"cu_seqlens_k": ends(0, 4, 7, 10)},
        ValueError,
        "cu_seqlens_q",
        "2 sequences",
        "cu_seqlens_k",
        "3",
        "must be as many",
    ),
    "cu_seqlens_q does not start with 0": (
        {"cu_seqlens_q": ends(1, 3, 8)},
        ValueError,
        "cu_seqlens_q must start with 0",
        "[1, 3, 8]",
    ),
    "cu_seqlens_k decreases": (
        {"cu_seqlens_k": ends(0, 6, 4)},
        ValueError,
        "cu_seqlens_k must not decrease",
        "[0, 6, 4]",
    ),
    "cu_seqlens_q is negative": (
        {"cu_seqlens_q": ends(0, -3, 2)},
        ValueError,
        "cu_seqlens_q must not decrease",
        "[0, -3, 2]",
    ),
    "cu_seqlens_k goes past the end": (
        {"cu_seqlens_k": ends(0, 5, 11)},
        ValueError,
        "cu_seqlens_k must not end beyond the 10 rows of k",
        "[0, 5, 11]",
    ),
    "cu_seqlens_q goes past the end and comes back": (
        {"cu_seqlens_q": ends(0, 11, 8), "max_seqlen_q": 11},
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
        "max_seqlen_q must be a Python int",
        "float",
    ),
    "max_seqlen_q is a tensor": (
        {"max_seqlen_q": torch.tensor(5)},
        TypeError,
        "max_seqlen_q must be a Python int",
        "Tensor",
    ),
    "max_seqlen_k is a truth value": (
        {"max_seqlen_k": True},
        TypeError,
        "max_seqlen_k must be a Python int",
        "bool",
    ),
    "max_seqlen_k is None": (
        {"max_seqlen_k": None},
        TypeError,
        "max_seqlen_k must be a Python int",
        "NoneType",
    ),
}

# ----------------------------------------------------------------------------
# scaled_dot_product_attention

TORCHS = {"query": zeros(2, 4, 5, 3), "key": zeros(2, 4, 7, 3), "value": zeros(2, 4, 7, 6)}
TORCHS_ARGUMENTS: Table = {
    "query is no tensor": ({"query": 1.0}, TypeError, "query", "torch.Tensor", "float"),
    "query has 1 dimension": ({"query": zeros(3)}, ValueError, "query", "(3,)"),
    "all are integers": (
        {x: y.long() for x, y in TORCHS.items()},
        TypeError,
        "query",
        "int64",
        DTYPES,
    ),
    "key has another dtype": (
        {"key": zeros(2, 4, 7, 3, dtype=torch.float32)},
        TypeError,
        "key",
        "torch.float32",
        "torch.float64",
    ),
    "value is on another device": (
        {"value": zeros(2, 4, 7, 6, device="meta")},
        ValueError,
        "value",
        "meta",
        "cpu",
    ),
    "value is longer than key": (
        {"value": zeros(2, 4, 8, 6)},
        ValueError,
        "key",
        "value",
        "7",
        "8",
    ),
    "key has another head_dim": ({"key": zeros(2, 4, 7, 4)}, ValueError, "key", "4", "3"),
    "head_dim 257": (
        {"query": zeros(2, 4, 5, 257), "key": zeros(2, 4, 7, 257)},
        ValueError,
        "query",
        "257",
        "1 to 256",
    ),
    "leading dimensions that do not broadcast": (
        {"key": zeros(3, 4, 7, 3), "value": zeros(3, 4, 7, 6)},
        ValueError,
        "query",
        "(2, 4, 5, 3)",
        "(3, 4, 7, 3)",
        "must broadcast",
    ),
    "grouped heads without enable_gqa": (
        {"key": zeros(2, 2, 7, 3), "value": zeros(2, 2, 7, 6)},
        ValueError,
        "enable_gqa",
        "4",
        "2",
    ),
    "heads that cannot be grouped": (
        {"key": zeros(2, 3, 7, 3), "value": zeros(2, 3, 7, 6), "enable_gqa": True},
        ValueError,
        "4",
        "3",
        "multiple",
    ),
    "the mask is of integers": (
        {"attn_mask": zeros(5, 7, dtype=torch.int32)},
        TypeError,
        "attn_mask",
        "torch.int32",
        "bool",
    ),
    "the mask does not broadcast": (
        {"attn_mask": zeros(5, 6)},
        ValueError,
        "attn_mask",
        "(5, 6)",
        "(2, 4, 5, 7)",
    ),
    "the mask has more dimensions": (
        {"attn_mask": zeros(1, 2, 4, 5, 7)},
        ValueError,
        "attn_mask",
        "(1, 2, 4, 5, 7)",
    ),
    "the mask is on another device": (
        {"attn_mask": zeros(5, 7, device="meta")},
        ValueError,
        "attn_mask",
        "meta",
        "cpu",
    ),
    "a mask and is_causal": (
        {"attn_mask": zeros(5, 7), "is_causal": True},
        ValueError,
        "attn_mask",
        "is_causal",
    ),
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p", "0.1", "eval()"),
    "a negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p", "-0.1"),
    "a dropout above 1": ({"dropout_p": 1.5}, ValueError, "dropout_p", "1.5"),
    "a tensor as scale": ({"scale": torch.tensor(1.0)}, TypeError, "scale", "Tensor"),
    "NaN as scale": ({"scale": float("nan")}, ValueError, "scale", "finite", "nan"),
}

# ----------------------------------------------------------------------------
# merge_attention

OUT, LSE = zeros(2, 5, 4, 6), zeros(2, 4, 5)
MERGED = {"parts": [(OUT, LSE), (OUT, LSE)]}


def second(*part: Any) -> dict[str, Any]:
    return {"parts": [(OUT, LSE), part]}


PARTS: Table = {
    "no parts": ({"parts": []}, ValueError, "parts is empty", "at least one (out, lse)"),
    "one tensor": ({"parts": OUT}, TypeError, "parts must be a sequence of (out, lse)", "Tensor"),
    "a part is a tensor": ({"parts": [OUT]}, TypeError, "parts[0] must be a pair", "Tensor"),
    "a part has no lse": (second(OUT), TypeError, "parts[1]", "(out, lse)", "(Tensor)"),
    "lse is None": (second(OUT, None), TypeError, "parts[1]", "(out, lse)", "NoneType"),
    "lse is transposed": (
        {"parts": [(OUT, LSE.mT)]},
        ValueError,
        "parts[0]: lse has shape (2, 5, 4)",
        "(2, 4, 5)",
    ),
    "out has 2 dimensions": (
        {"parts": [(zeros(5, 6), zeros(5))]},
        ValueError,
        "parts[0]: out must have dimensions (..., seqlen_q, heads, head_dim_v)",
        "(5, 6)",
    ),
    "another number of rows": (
        second(zeros(2, 4, 4, 6), zeros(2, 4, 4)),
        ValueError,
        "parts[1]: out has shape (2, 4, 4, 6)",
        "(2, 5, 4, 6)",
    ),
    "out is of integers": (
        {"parts": [(OUT.long(), LSE)]},
        TypeError,
        "parts[0]: out has dtype torch.int64",
        DTYPES,
    ),
    "out has another dtype": (
        second(OUT.float(), LSE.float()),
        TypeError,
        "parts[1]: out has dtype torch.float32",
        "torch.float64",
    ),
    "lse in half precision": (
        {"parts": [(OUT.half(), LSE.half())]},
        TypeError,
        "parts[0]: lse has dtype torch.float16",
        "must be float32",
    ),
    "out is on another device": (
        second(OUT.to("meta"), LSE),
        ValueError,
        "parts[1]: out is on meta",
        "cpu",
    ),
    "lse is on another device": (
        {"parts": [(OUT, LSE.to("meta"))]},
        ValueError,
        "parts[0]: lse is on meta",
        "cpu",
    ),
}

# ----------------------------------------------------------------------------

CALLS: tuple[tuple[Callable[..., Any], dict[str, Any], Table], ...] = (
    (flash_attn_jvp, DENSE, TENSORS | SCALES | CAUSAL | MASKS),
    (flash_attn_with_tangent, DENSE, TENSORS | SCALES | CAUSAL | MASKS | TANGENTS),
    (flash_attn_varlen_jvp, PACKED, PACKING | SCALES | CAUSAL),
    (scaled_dot_product_attention, TORCHS, TORCHS_ARGUMENTS),
    (merge_attention, MERGED, PARTS),
)


def bad_calls() -> Iterator[Any]:
    for function, good, table in CALLS:
        for what_is_wrong, (wrong, error, *words) in table.items():
            name = f"{function.__name__}, {what_is_wrong}"
            yield pytest.param(function, {**good, **wrong}, error, words, id=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "arguments", "error", "words"), bad_calls())
def test_the_message_says_what_is_wrong_what_was_given_and_what_is_allowed(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception],
    words: list[str],
    backend: str,
) -> None:
    with jvp_attn.backend(backend), pytest.raises(error) as raised:
        function(**arguments)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "arguments"), [call[:2] for call in CALLS], ids=[c[0].__name__ for c in CALLS]
)
def test_without_what_is_wrong_nothing_is_refused(
    function: Callable[..., Any], arguments: dict[str, Any], backend: str
) -> None:
    with jvp_attn.backend(backend):
        function(**arguments)


def test_options_cannot_be_given_by_position() -> None:
    with pytest.raises(TypeError, match="positional"):
        flash_attn_jvp(*DENSE.values(), 0.5)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "tangent",
    [zeros(1, 5, 4, 3), zeros(2, 5, 4)],
    ids=["that could be broadcast", "of other dimensions"],
)
def test_torch_refuses_a_tangent_of_another_shape(tangent: Tensor) -> None:
    with pytest.raises(RuntimeError, match="forward gradient that has a different size"):
        jvp(lambda q: flash_attn_jvp(**{**DENSE, "q": q}), (DENSE["q"],), (tangent,))


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_dual_number_whose_tangent_has_another_dtype_is_refused(
    dtype: torch.dtype, name: str
) -> None:
    """torch lets it pass."""
    primals = {x: y.float() for x, y in {**DENSE, "attn_mask": zeros(5, 7)}.items()}
    x = primals[name]
    message = rf"\b{name}\b.*{dtype}.*torch.float32"
    with pytest.raises(TypeError, match=message):
        jvp(lambda y: flash_attn_jvp(**{**primals, name: y}), (x,), (x.to(dtype),))
    leaf = x.clone().requires_grad_()
    with fwAD.dual_level(), pytest.raises(TypeError, match=message):
        flash_attn_jvp(**{**primals, name: fwAD.make_dual(leaf, x.to(dtype))})


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_vmap_over_cu_seqlens_is_refused(which: str) -> None:
    def of_packing(cu_seqlens: Tensor) -> Tensor:
        return flash_attn_varlen_jvp(**{**PACKED, which: cu_seqlens})

    with pytest.raises(ValueError, match=r"vmap over cu_seqlens_q or cu_seqlens_k .* one call"):
        vmap(of_packing)(torch.stack([PACKED[which], PACKED[which]]))


# ----------------------------------------------------------------------------
# Sizes beyond 32 bits, of which tensors without data tell what would come

HUGE = {
    "more than 2³¹ numbers": Case(1, 2**24, 2**24, 32, 8, 128, 128, dtype=torch.bfloat16),
    "more than 2³¹ keys": Case(1, 2, 2**31 + 1, 1, 1, 1, 1),
    "more than 2³¹ queries": Case(1, 2**31 + 1, 2, 1, 1, 1, 1),
    "more than 2³¹ batches": Case(2**31 + 1, 1, 1, 1, 1, 1, 1),
}


def without_data(case: Case) -> dict[str, Tensor]:
    queries = (case.batch, case.seqlen_q, case.heads)
    keys = (case.batch, case.seqlen_k, case.heads_k)
    shapes = {
        "q": (*queries, case.head_dim),
        "k": (*keys, case.head_dim),
        "v": (*keys, case.head_dim_v),
    }
    return {x: torch.empty(y, dtype=case.dtype, device="meta") for x, y in shapes.items()}


@pytest.mark.parametrize("case", HUGE.values(), ids=HUGE.keys())
def test_sizes_may_be_beyond_32_bits(case: Case) -> None:
    primals = [x.requires_grad_() for x in without_data(case).values()]
    out, out_tangent = jvp(lambda *x: flash_attn_jvp(*x), tuple(primals), tuple(primals))
    assert out.shape == out_tangent.shape == (*primals[0].shape[:3], case.head_dim_v)
    gradients = torch.autograd.grad((out + out_tangent).sum(), primals)
    assert [g.shape for g in gradients] == [x.shape for x in primals]


@pytest.mark.parametrize("name", ["more than 2³¹ numbers", "more than 2³¹ keys"])
def test_packed_sequences_may_be_beyond_32_bits(name: str) -> None:
    q, k, v = (x[0] for x in without_data(HUGE[name]).values())
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
    out = flash_attn_varlen_jvp(q, k, v, cu_seqlens, cu_seqlens, len(q), len(k))
    assert out.shape == (*q.shape[:2], v.shape[2])


# ----------------------------------------------------------------------------
# Derivatives of third order, and of second order in forward mode: never silently zero

X = Case().data()
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
