"""Bad arguments of `scaled_dot_product_attention` raise an error that says what is allowed."""

from __future__ import annotations

import torch

import jvp_attn
from jvp_attn import scaled_dot_product_attention
from tests.jvp_attn.bad_arguments import (
    DTYPES,
    BadCall,
    Table,
    over_backends,
    over_bad_calls,
    zeros,
)

GOOD = {"query": zeros(2, 4, 5, 3), "key": zeros(2, 4, 7, 3), "value": zeros(2, 4, 7, 6)}
ARGUMENTS: Table = {
    "query is not a tensor": ({"query": 1.0}, TypeError, "query", "torch.Tensor", "float"),
    "query has 1 dimension": ({"query": zeros(3)}, ValueError, "query", "(3,)"),
    "all are integers": (
        {x: y.long() for x, y in GOOD.items()},
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
    "no key heads": (
        {"key": zeros(2, 0, 7, 3), "value": zeros(2, 0, 7, 6), "enable_gqa": True},
        ValueError,
        "query has 4 heads",
        "multiple",
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


@over_backends
@over_bad_calls(GOOD, {scaled_dot_product_attention: ARGUMENTS})
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)


@over_backends
def test_good_arguments_raise_nothing(backend: str) -> None:
    with jvp_attn.backend(backend):
        scaled_dot_product_attention(**GOOD)
