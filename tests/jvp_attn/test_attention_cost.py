"""Tangents that are absent cost no matrix product; memory is linear in the sequence length."""

from __future__ import annotations

from collections.abc import Callable
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


class CountMatrixProducts(TorchDispatchMode):
    """How many there are of them."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function.overloadpacket in MATRIX_PRODUCTS
        return function(*args, **(kwargs or {}))


def matrix_products(of: Callable[[], object]) -> int:
    with CountMatrixProducts() as products:
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
