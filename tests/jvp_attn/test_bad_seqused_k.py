"""A bad seqused_k raises an error that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import jvp, vmap

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from tests.jvp_attn.attention_cases import Case


def _int32(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([1, 2, 3], TypeError, "seqused_k must be a torch.Tensor or None, got list"),
    "int64": (torch.tensor([1, 2, 3]), TypeError, "seqused_k has dtype torch.int64; .* int32"),
    "another batch": (
        _int32(1, 2),
        ValueError,
        r"seqused_k must have shape \(batch,\) = \(3,\), got \(2,\)",
    ),
    "another device": (
        torch.ones(3, dtype=torch.int32, device="meta"),
        ValueError,
        "seqused_k is on meta but q is on cpu",
    ),
    "too long": (
        _int32(1, 8, 3),
        ValueError,
        r"seqused_k must be 0 to 7; seqused_k is \[1, 8, 3\]",
    ),
    "negative": (_int32(1, -1, 3), ValueError, r"0 to 7; seqused_k is \[1, -1, 3\]"),
}


@pytest.mark.parametrize("backend", ["cpu", "tiled", "math"])
@pytest.mark.parametrize(("value", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_length_is_an_error(
    value: Any, error: type[Exception], message: str, backend: str
) -> None:
    q, k, v = Case(3).primals().values()
    with jvp_attn.backend(backend), pytest.raises(error, match=message):
        flash_attn_jvp(q, k, v, seqused_k=value)
    with jvp_attn.backend(backend), pytest.raises(error, match=message):
        flash_attn_with_tangent(q, k, v, q, seqused_k=value)
    with jvp_attn.backend(backend), pytest.raises(error, match=message):
        jvp(lambda q: flash_attn_jvp(q, k, v, seqused_k=value), (q,), (q,))


@pytest.mark.parametrize("backend", ["tiled", "math"])
def test_a_mapped_bad_length_is_an_error(backend: str) -> None:
    q, k, v = Case(1).primals().values()
    lengths = torch.tensor([[1], [8]], dtype=torch.int32)
    with jvp_attn.backend(backend), pytest.raises(ValueError, match="seqused_k must be 0 to 7"):
        vmap(lambda n: flash_attn_jvp(q, k, v, seqused_k=n))(lengths)
