"""Bad masks raise an error that says what is wrong and what is allowed."""

from __future__ import annotations

import torch

from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from tests.jvp_attn.bad_arguments import (
    DENSE,
    BadCall,
    Table,
    over_backends,
    over_bad_calls,
    zeros,
)

MASKS: Table = {
    "the mask is not a tensor": (
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
    "the mask is less precise than q": (
        {"attn_mask": zeros(5, 7, dtype=torch.float32)},
        TypeError,
        "attn_mask has dtype torch.float32",
        "q has torch.float64",
        "bool, float64",
    ),
    "the mask is more precise than q": (
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


@over_backends
@over_bad_calls(DENSE, dict.fromkeys([flash_attn_jvp, flash_attn_with_tangent], MASKS))
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)
