"""Kinds of data for the tests of precision."""

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
    """Large means that cancel: that of K in the softmax, that of V in the gradient of Q."""
    return {**data, "k": data["k"] + 5, "tk": data["tk"] + 5, "v": data["v"] + 3}


def large_logits(data: Named) -> Named:
    """The softmax nearly selects one key; exp of a logit overflows."""
    return {**data, "q": 30 * data["q"], "tq": 30 * data["tq"]}


over_data = pytest.mark.parametrize(
    "kind", [plain, offset, large_logits], ids=lambda kind: kind.__name__
)


def in_dtype(data: Named, dtype: torch.dtype) -> dict[str, Tensor]:
    """All but boolean masks."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}
