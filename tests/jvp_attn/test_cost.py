"""The work is that of the formulas, without masked keys and absent tangents; memory is linear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from jvp_attn.backends import tiled
from jvp_attn.types import Inputs
from tests.jvp_attn.attention_cases import (
    INPUTS,
    Attention,
    Case,
    Named,
    outputs_and_gradients,
    part,
    peak_and_largest_allocation,
    projection,
    small_tiles,
    with_tangents,
    without_tangents,
)
from tests.jvp_attn.packed_cases import PackedCase

# The tests count matrix products of torch, which this backend consists of.
pytestmark = pytest.mark.parametrize("computed_by", ["tiled"], indirect=True)

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.matmul, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.mm, aten.addmm}

Primitive = Callable[..., Any]


def wrapped_primitives(wrapper: Callable[[Primitive], Primitive]) -> AbstractContextManager[object]:
    """Wrap the primitives of the backend `tiled`; its `backward` calls another of them."""
    names = ("forward", "forward_jvp", "jvp_backward")
    return mock.patch.multiple(tiled, **{name: wrapper(getattr(tiled, name)) for name in names})


# ----------------------------------------------------------------------------
# Matrix products


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products and their floating point operations."""

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


def products_of(of: Callable[[], object]) -> MatrixProducts:
    """The products inside the primitives, which dispatch modes outside do not see."""
    products = MatrixProducts()

    def counted(primitive: Primitive) -> Primitive:
        def within(*arguments: Any) -> Any:
            with products:
                return primitive(*arguments)

        return within

    with wrapped_primitives(counted):
        of()
    return products


def matrix_products(of: Callable[[], object]) -> int:
    return products_of(of).count


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
        ("m", 3),  # Q Kᵀ, P V, (P∘(T − mu)) V
        ("qm", 4),
        ("vm", 4),
        ("qkvm", 6),
    ],
)
def test_forward_jvp_computes_no_needless_products(with_tangent: str, count: int) -> None:
    case = Case(with_tangent=with_tangent, mask="additive" if "m" in with_tangent else None)
    data = case.data()
    assert matrix_products(lambda: with_tangents(case.ours, data)) == count
    with torch.no_grad():
        assert matrix_products(lambda: with_tangents(case.ours, data)) == count


def test_forward_has_2_products_and_backward_5() -> None:
    case = Case()
    primals = case.primals()
    assert matrix_products(lambda: case.ours(**primals)) == 2
    both = matrix_products(
        lambda: outputs_and_gradients(case.ours, primals, evaluate=without_tangents)
    )
    assert both == 2 + 5


def test_forward_jvp_has_6_products_and_its_backward_15() -> None:
    case = Case()
    data = case.data()
    assert matrix_products(lambda: outputs_and_gradients(case.ours, data)) == 6 + 15


@pytest.mark.parametrize("case", [Case(mask="boolean"), Case(mask="additive")])
def test_masks_and_their_gradients_need_no_products(case: Case) -> None:
    data = case.data()
    assert matrix_products(lambda: with_tangents(case.ours, data)) == 6
    assert matrix_products(lambda: outputs_and_gradients(case.ours, data)) == 6 + 15


def test_the_gradient_of_a_mask_alone_needs_2_products() -> None:
    case = Case(mask="additive")
    data = case.primals()
    mask = data["attn_mask"].requires_grad_()
    out, _ = case.ours(**data)
    loss = out.square().sum()
    assert matrix_products(lambda: torch.autograd.grad(loss, mask)) == 2  # Q Kᵀ and dO Vᵀ


def test_constant_tangents_need_no_gradient_products() -> None:
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
        ("out_tangent", 13),  # all but dO Vᵀ and Pᵀ dO
        ("mu", 9),  # also without dtO Vᵀ, dtO tVᵀ, (P∘(T − mu))ᵀ dtO and Pᵀ dtO
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
# Directions of one point


def times(n: int, x: Tensor) -> Tensor:
    return x.expand(n, *x.shape)


@pytest.mark.parametrize(
    ("directions", "batch", "passes"),
    [(5, 1, 1), (5, 2, 2), (2, 5, 2)],
)
def test_vmapped_directions_take_at_most_one_pass_per_batch_element(
    directions: int, batch: int, passes: int
) -> None:
    case = Case(batch=batch)
    x, t = case.point_and_direction()

    def along_all() -> object:
        return vmap(lambda *t: jvp(case.ours, x, t))(*(times(directions, y) for y in t))

    assert matrix_products(along_all) == 6 * passes


def test_vmap_with_a_shared_mask_takes_one_pass() -> None:
    case = Case(mask="boolean", mask_dims=".h.k")
    *x, mask = case.primals().values()
    mapped = [times(3, y) for y in x]
    assert matrix_products(lambda: vmap(lambda *x: case.ours(*x, mask))(*mapped)) == 2


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask_dims", ["bhqk", ".h.k"])
def test_vmapped_directions_share_the_memory_of_the_primals(mask_dims: str, batch: int) -> None:
    case = Case(batch=batch, mask="additive", mask_dims=mask_dims)
    data = case.data()
    primals = part(data, INPUTS.values())

    def of_q(q: Tensor) -> Tensor:
        return case.ours(**{**primals, "q": q})[0]

    def along(tq: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(of_q, (data["q"],), (tq,))

    out, pull_back = vjp(of_q, data["q"])
    _, pull_tangent_back = vjp(along, data["tq"])
    found = []

    def recording(primitive: Primitive) -> Primitive:
        def recorded(inputs: Inputs, *others: Any) -> Any:
            found.append(inputs)
            return primitive(inputs, *others)

        return recorded

    with wrapped_primitives(recording):
        vmap(along)(times(3, data["tq"]))
        vmap(pull_back)(times(3, out))
        vmap(pull_tangent_back)((times(3, out), times(3, out)))
    assert len(found) == 3 * batch
    for inputs in found:
        for name, x in zip(primals, inputs[:4], strict=True):
            assert x.untyped_storage().data_ptr() == primals[name].untyped_storage().data_ptr()


# ----------------------------------------------------------------------------
# Floating point operations


def operations(case: Case | PackedCase) -> tuple[int, int]:
    """The operations of forward JVP, and of forward JVP and its backward."""
    data = case.data()
    forward = products_of(lambda: with_tangents(case.ours, data))
    both = products_of(lambda: outputs_and_gradients(case.ours, data))
    return forward.operations, both.operations


def test_flops_are_12_and_30_times_batch_heads_seqlens_and_head_dim() -> None:
    case = Case(batch=2, seqlen_q=30, seqlen_k=50, heads=4, heads_k=2, head_dim=8, head_dim_v=8)
    unit = 2 * 4 * 30 * 50 * 8
    with small_tiles(scores=200, rows=1):
        assert operations(case) == (12 * unit, 12 * unit + 30 * unit)


def test_causal_attention_takes_about_half_the_flops() -> None:
    full = Case(batch=1, seqlen_q=64, seqlen_k=64)
    with small_tiles(scores=1, rows=8):
        for operations_full, operations_causal in zip(
            operations(full), operations(replace(full, causal=True)), strict=True
        ):
            assert operations_causal < 0.55 * operations_full


def test_packed_sequences_attend_to_their_own_keys_only() -> None:
    case = PackedCase(seqlens_q=(30, 1, 0), seqlens_k=(50, 7, 4), head_dim=8, head_dim_v=8)
    unit = 4 * (30 * 50 + 1 * 7) * 8
    assert operations(case) == (12 * unit, 12 * unit + 30 * unit)


# ----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_memory_is_linear_in_the_sequence_length(causal: bool) -> None:
    def memory(seqlen: int) -> tuple[int, int]:
        case = Case(1, seqlen, seqlen, 2, 1, 4, 4, causal=causal, dtype=torch.float32)
        data = case.data()
        with small_tiles(scores=2**12, rows=4):
            return peak_and_largest_allocation(lambda: outputs_and_gradients(case.ours, data))

    (peak, largest), (peak_of_twice, largest_of_twice) = memory(512), memory(1024)
    assert peak_of_twice < 2.1 * peak
    assert largest_of_twice < 2.1 * largest
    assert largest_of_twice < 1024 * 1024 * 4 / 32  # there are 1024 × 1024 scores a head
