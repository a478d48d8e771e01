"""Bad parts of `merge_attention` raise an error that says what is wrong and what is allowed."""

from __future__ import annotations

from typing import Any

import jvp_attn
from jvp_attn import merge_attention
from tests.jvp_attn.bad_arguments import (
    DTYPES,
    BadCall,
    Table,
    over_backends,
    over_bad_calls,
    zeros,
)

OUT, LSE = zeros(2, 5, 4, 6), zeros(2, 4, 5)
GOOD = {"parts": [(OUT, LSE), (OUT, LSE)]}


def bad_second(*part: Any) -> dict[str, Any]:
    """A good part, then this one."""
    return {"parts": [(OUT, LSE), part]}


PARTS: Table = {
    "no parts": ({"parts": []}, ValueError, "parts is empty", "at least one (out, lse)"),
    "one tensor": ({"parts": OUT}, TypeError, "parts must be a sequence of (out, lse)", "Tensor"),
    "a part is a tensor": ({"parts": [OUT]}, TypeError, "parts[0] must be a tuple", "Tensor"),
    "a part has no lse": (bad_second(OUT), TypeError, "parts[1]", "(out, lse)", "(Tensor)"),
    "lse is None": (bad_second(OUT, None), TypeError, "parts[1]", "(out, lse)", "NoneType"),
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
        bad_second(zeros(2, 4, 4, 6), zeros(2, 4, 4)),
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
        bad_second(OUT.float(), LSE.float()),
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
        bad_second(OUT.to("meta"), LSE),
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


@over_backends
@over_bad_calls(GOOD, {merge_attention: PARTS})
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)


@over_backends
def test_good_parts_raise_nothing(backend: str) -> None:
    with jvp_attn.backend(backend):
        merge_attention(**GOOD)
