"""deterministic=False reaches the backend, and its gradients are as exact as those with True."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn.backends import meta, select, tiled
from tests.jvp_attn.attention_cases import (
    Case,
    assert_exact_to_two_roundings,
    outputs_and_gradients,
    part,
    projection,
    without_tangents,
)
from tests.jvp_attn.data_kinds import Kind, in_dtype, over_data
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.packed_cases import PackedCase

# ----------------------------------------------------------------------------
# The option reaches the backend


class OptionRecorder:
    """The backend `tiled`, which records the option `deterministic` of each call."""

    def __init__(self) -> None:
        self.deterministic: dict[str, bool] = {}

    def __getattr__(self, name: str) -> Any:
        def recording(*arguments: Any) -> Any:
            self.deterministic[name] = arguments[-1].deterministic
            return getattr(tiled, name)(*arguments)

        return recording


@contextmanager
def recording_backend() -> Iterator[OptionRecorder]:
    backend = OptionRecorder()
    recording = select._Backend(lambda: backend, meta=meta)
    with mock.patch.dict(select._BACKENDS, {"recording": recording}), jvp_attn.backend("recording"):
        yield backend


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    starts = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    lengths = (q.shape[1], q.shape[1])
    return jvp_attn.flash_attn_varlen_jvp(q[0], k[0], v[0], starts, starts, *lengths, **options)


def with_tangent_of_q(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return jvp_attn.flash_attn_with_tangent(q, k, v, q.detach(), **options)[0]


FUNCTIONS = {
    "flash_attn_jvp": jvp_attn.flash_attn_jvp,
    "flash_attn_varlen_jvp": packed,
    "flash_attn_with_tangent": with_tangent_of_q,
}
over_functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def inputs() -> list[Tensor]:
    return [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3)]


@over_functions
def test_the_option_deterministic_reaches_the_backend(
    function: Callable[..., Tensor],
) -> None:
    for options, deterministic in (({}, True), ({"deterministic": False}, False)):
        with recording_backend() as backend:
            function(*inputs(), **options).sum().backward()
        assert backend.deterministic["backward"] == deterministic


def test_a_compiled_call_passes_the_option_on() -> None:
    with recording_backend() as backend:
        attention = partial(jvp_attn.flash_attn_jvp, deterministic=False)
        torch.compile(attention, fullgraph=True, backend="aot_eager")(*inputs()).sum().backward()
    assert backend.deterministic["backward"] is False


# ----------------------------------------------------------------------------
# Gradients


@contextmanager
def nondeterministic() -> Iterator[None]:
    """Attention of the tests runs with deterministic=False, on an emulated Hopper GPU."""
    names = ("flash_attn_jvp", "flash_attn_varlen_jvp")
    changed = {name: partial(getattr(jvp_attn, name), deterministic=False) for name in names}
    with (
        emulated_backend((9, 0)),
        mock.patch("tests.jvp_attn.attention_cases.flash_attn_jvp", changed[names[0]]),
        mock.patch("tests.jvp_attn.packed_cases.flash_attn_varlen_jvp", changed[names[1]]),
    ):
        yield


CASES = {
    "grouped heads, causal": Case(
        1, 150, 200, heads=4, heads_k=2, head_dim=64, head_dim_v=40, causal=True
    ),
    "fewer keys than queries": Case(
        1, 140, 80, heads=1, heads_k=1, head_dim=72, head_dim_v=96, causal=True
    ),
    "packed": PackedCase(
        (70, 0, 133, 5), (80, 10, 0, 20), beyond=3, heads=2, heads_k=1, head_dim=128, head_dim_v=104
    ),
}


@over_data
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_nondeterministic_gradients_are_exact_to_two_roundings(
    case: Case | PackedCase, kind: Kind
) -> None:
    data = in_dtype(part(kind(case.data()), ("q", "k", "v")), torch.bfloat16)
    through = projection(dtype=torch.bfloat16)
    with nondeterministic():
        ours, exact = (
            outputs_and_gradients(f, x, evaluate=without_tangents, through=through)
            for f, x in ((case.ours, data), (case.naive, in_dtype(data, torch.float64)))
        )
    assert_exact_to_two_roundings(ours, exact)
