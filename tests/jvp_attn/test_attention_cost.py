"""Work is what the formulas need, hidden keys and absent tangents left out; memory is linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from attention_cases import (
    Attention,
    Case,
    Named,
    outputs_and_gradients,
    projection,
    small_blocks,
    with_tangents,
    without_tangents,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}


# ----------------------------------------------------------------------------
# Matrix products


class MatrixProducts(TorchDispatchMode):
    """How many there are, and of how many operations."""

    count = 0
    operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket in MATRIX_PRODUCTS:
            *_, a, b = args
            self.count += 1
            self.operations += 2 * a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))


def matrix_products(of: Callable[[], object]) -> int:
    with MatrixProducts() as products:
        of()
    return products.count


@pytest.mark.parametrize(
    ("with_tangent", "count"),
    [
        ("q", 4),  # Q Kᵀ, P V, tQ Kᵀ, (P∘(T − mu)) V
        ("k", 4),  # Q Kᵀ, P V, Q tKᵀ, (P∘(T − mu)) V
        ("v", 3),  # Q Kᵀ, P V, P tV
        ("qk", 5),
        ("qv", 5),
        ("kv", 5),
        ("qkv", 6),
    ],
)
def test_forward_with_tangent_has_as_many_products_as_it_needs(
    with_tangent: str, count: int
) -> None:
    case = Case(with_tangent=with_tangent)
    data = case.data()
    assert matrix_products(lambda: with_tangents(case.ours, data)) == count
    with torch.no_grad():
        assert matrix_products(lambda: with_tangents(case.ours, data)) == count


def test_forward_has_2_products_and_forward_and_backward_7() -> None:
    case = Case()
    primals = case.primals()
    assert matrix_products(lambda: case.ours(**primals)) == 2
    both = matrix_products(
        lambda: outputs_and_gradients(case.ours, primals, evaluate=without_tangents)
    )
    assert both == 2 + 5


def test_forward_and_backward_with_all_tangents_have_21_products() -> None:
    case = Case()
    data = case.data()
    assert matrix_products(lambda: outputs_and_gradients(case.ours, data)) == 6 + 15


def test_gradients_of_tangents_that_are_constant_cost_nothing() -> None:
    case = Case()

    def constant_tangents(attention: Attention, leaves: Named) -> dict[str, Tensor]:
        tangents = {x: leaf.detach() for x, leaf in leaves.items() if x.startswith("t")}
        return with_tangents(attention, {**leaves, **tangents})

    data = case.data()
    both = matrix_products(
        lambda: outputs_and_gradients(case.ours, data, evaluate=constant_tangents)
    )
    assert both == 6 + 15 - 3


@pytest.mark.parametrize(
    ("through", "count"),
    [
        ("out", 5),  # as without tangents
        ("lse", 3),  # Q Kᵀ, P K, Pᵀ Q
        ("out_tangent", 13),  # all but gO Vᵀ and Pᵀ gO
        ("mu", 9),  # also without gT Vᵀ, gT tVᵀ, (P∘(T − mu))ᵀ gT and Pᵀ gT
    ],
)
def test_backward_of_one_output_has_fewer_products(through: str, count: int) -> None:
    case = Case()
    data = case.data()
    both = matrix_products(
        lambda: outputs_and_gradients(case.ours, data, through=projection(through))
    )
    assert both - 6 == count


# ----------------------------------------------------------------------------
# Floating point operations


def operations(case: Case) -> tuple[int, int]:
    """Those of forward+tangent, and of that and its backward pass."""
    data = case.data()
    with MatrixProducts() as forward:
        with_tangents(case.ours, data)
    with MatrixProducts() as both:
        outputs_and_gradients(case.ours, data)
    return forward.operations, both.operations


def test_operations_are_12_and_30_times_batch_heads_seqlens_and_head_dim() -> None:
    case = Case(batch=2, seqlen_q=30, seqlen_k=50, heads=4, heads_k=2, head_dim=8, head_dim_v=8)
    unit = 2 * 4 * 30 * 50 * 8
    with small_blocks(scores=200, rows=1):
        assert operations(case) == (12 * unit, 12 * unit + 30 * unit)


def test_causal_attention_takes_about_half_the_operations() -> None:
    full = Case(batch=1, seqlen_q=64, seqlen_k=64)
    with small_blocks(scores=1, rows=8):
        for operations_full, operations_causal in zip(
            operations(full), operations(replace(full, causal=True)), strict=True
        ):
            assert operations_causal < 0.55 * operations_full


# ----------------------------------------------------------------------------
# Memory


def peak_and_largest_allocation(of: Callable[[], object]) -> tuple[int, int]:
    """In bytes: of all that a computation holds at once, and of the largest tensor."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        of()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes)), max(sizes)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_memory_is_linear_in_the_sequence_length(causal: bool) -> None:
    def memory(seqlen: int) -> tuple[int, int]:
        case = Case(1, seqlen, seqlen, 2, 1, 4, 4, causal=causal, dtype=torch.float32)
        data = case.data()
        with small_blocks(scores=2**12, rows=4):
            return peak_and_largest_allocation(lambda: outputs_and_gradients(case.ours, data))

    (peak, largest), (peak_of_twice, largest_of_twice) = memory(512), memory(1024)
    assert peak_of_twice < 2.1 * peak
    assert largest_of_twice < 2.1 * largest
    assert largest_of_twice < 1024 * 1024 * 4 / 32  # there are 1024 × 1024 scores a head
