"""Calls with a bad argument, for the tests of error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import Causal
from tests.jvp_attn.attention_cases import BACKENDS, Case
from tests.jvp_attn.packed_cases import PackedCase

# What is wrong → (the bad arguments, the error, and words of its message: the name of the argument,
# what was given, what is allowed). A function stands for the argument that it returns.
Table = dict[str, tuple[Any, ...]]


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@dataclass(frozen=True)
class BadCall:
    """A call that raises."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]

    def assert_raises(self, backend: str) -> None:
        """The error has the right type, and its message has all the words."""
        arguments = {
            name: x() if isinstance(x, FunctionType) else x for name, x in self.arguments.items()
        }
        with jvp_attn.backend(backend), pytest.raises(self.error) as raised:
            self.function(**arguments)
        assert [word for word in self.words if word not in str(raised.value)] == [], raised.value


def over_bad_calls(
    good: dict[str, Any], tables: dict[Callable[..., Any], Table]
) -> pytest.MarkDecorator:
    """Every function with its bad arguments, which replace some of the good ones."""
    calls = [
        pytest.param(
            BadCall(function, {**good, **bad}, error, tuple(words)),
            id=f"{function.__name__}, {what_is_wrong}",
        )
        for function, table in tables.items()
        for what_is_wrong, (bad, error, *words) in table.items()
    ]
    return pytest.mark.parametrize("call", calls)


over_backends = pytest.mark.parametrize("backend", BACKENDS)

# ----------------------------------------------------------------------------
# Good arguments

DENSE = Case(2, 5, 7, heads=4, heads_k=2, head_dim=3, head_dim_v=6).primals()
PACKED = {
    **PackedCase((3, 5), (4, 6)).primals(),
    "cu_seqlens_q": int32(0, 3, 8),
    "cu_seqlens_k": int32(0, 4, 10),
    "max_seqlen_q": 5,
    "max_seqlen_k": 6,
}

# ----------------------------------------------------------------------------
# What more than one function checks

DTYPES = "supported are float16, bfloat16, float32, float64"
MULTIPLE = "the heads of q must be a multiple of those of k and v"

SCALES: Table = {
    "a tensor as scale": (
        {"softmax_scale": torch.tensor(0.5)},
        TypeError,
        "softmax_scale must be a number or None",
        "Tensor",
        "multiplied into q",
    ),
    "a bool as scale": (
        {"softmax_scale": True},
        TypeError,
        "softmax_scale must be a number or None",
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
    "causal is a string": ({"causal": "no"}, TypeError, "causal must be True or False", "no"),
    "causal is a tensor": (
        {"causal": zeros(5, 7).bool()},
        TypeError,
        "causal must be True or False",
        "Tensor",
    ),
}
