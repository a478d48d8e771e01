"""Bad queries, keys and values raise an error that says what is wrong and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from tests.jvp_attn.bad_arguments import (
    CAUSAL,
    DENSE,
    DTYPES,
    MULTIPLE,
    SCALES,
    BadCall,
    Table,
    over_backends,
    over_bad_calls,
    zeros,
)

DIMENSIONS = "must have 4 dimensions (batch, seqlen, heads, head_dim)"
TENSORS: Table = {
    "q is not a tensor": ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor", "list"),
    "v is not a tensor": ({"v": None}, TypeError, "v must be a torch.Tensor", "NoneType"),
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
        {"q": lambda: torch.nested.nested_tensor(2 * [zeros(5, 4, 3)], layout=torch.jagged)},
        TypeError,
        "q must be a dense tensor",
        "torch.jagged",
    ),
    "q is nested": (
        {"q": lambda: torch.nested.nested_tensor(2 * [zeros(5, 4, 3)])},
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
    "all are bool": (
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
        MULTIPLE,
    ),
    "more key heads than heads": (
        {"q": zeros(2, 5, 1, 3)},
        ValueError,
        "q has 1 heads and k has 2",
        MULTIPLE,
    ),
    "no key heads": (
        {"k": zeros(2, 7, 0, 3), "v": zeros(2, 7, 0, 6)},
        ValueError,
        "q has 4 heads and k has 0",
        MULTIPLE,
    ),
}
FUNCTIONS = [flash_attn_jvp, flash_attn_with_tangent]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@over_backends
@over_bad_calls(DENSE, dict.fromkeys(FUNCTIONS, TENSORS | SCALES | CAUSAL))
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)


@over_backends
@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_raise_nothing(function: Callable[..., Any], backend: str) -> None:
    with jvp_attn.backend(backend):
        function(**DENSE)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        flash_attn_jvp(*DENSE.values(), 0.5)  # type: ignore[call-overload]
