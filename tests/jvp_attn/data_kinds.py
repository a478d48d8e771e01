"""Kinds of data on which attention is judged, in any dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.jvp_attn.attention_cases import Named

Kind = Callable[[Named], Named]


def plain(data: Named) -> Named:
    return data


def offset(data: Named) -> Named:
    """Means that cancel: softmax does not see that of K, nor the gradient of Q that of V."""
    return {**data, "k": data["k"] + 5, "tk": data["tk"] + 5, "v": data["v"] + 3}


def large_logits(data: Named) -> Named:
    """Softmax is nearly a choice of one key; exp of a logit alone overflows."""
    return {**data, "q": 30 * data["q"], "tq": 30 * data["tq"]}


over_data = pytest.mark.parametrize(
    "kind", [plain, offset, large_logits], ids=lambda kind: kind.__name__
)


def in_dtype(data: Named, dtype: torch.dtype) -> dict[str, Tensor]:
    """All but boolean masks."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}
