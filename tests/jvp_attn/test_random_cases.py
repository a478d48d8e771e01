"""Attention with random shapes, masks, tangents, strides, dtypes and tilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jvp_attn
from tests.jvp_attn.attention_cases import (
    BACKENDS,
    INPUTS,
    Case,
    assert_close,
    outputs_and_gradients,
    part,
    projection,
    relative_error,
    small_tiles,
)
from tests.jvp_attn.packed_cases import PackedCase

# ----------------------------------------------------------------------------
# Random cases


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_k = draw(st.integers(1, 3))
    torchs_interface, causal = draw(st.booleans()), draw(st.booleans())
    mask = draw(st.sampled_from([None, "boolean", "additive"]))
    if torchs_interface and causal:
        mask = None  # torch does not allow both
    return Case(
        batch=draw(st.integers(0, 3)),
        seqlen_q=draw(st.integers(0, 12)),
        seqlen_k=draw(st.integers(0, 12)),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        causal=causal,
        softmax_scale=draw(st.none() | st.floats(-2, 2)),
        mask=mask,
        mask_dims=draw(mask_dims()) if mask else "",
        with_tangent=draw(subsets("qkvm" if mask == "additive" else "qkv")),
        torchs_interface=torchs_interface,
    )


@st.composite
def mask_dims(draw: st.DrawFn) -> str:
    rank = draw(st.integers(0, 4))
    return "".join(draw(st.sampled_from([".", dim])) for dim in "bhqk"[4 - rank :])


def subsets(letters: str) -> st.SearchStrategy[str]:
    return st.sets(st.sampled_from(letters), min_size=1).map(lambda x: "".join(sorted(x)))


@st.composite
def packed_cases(draw: st.DrawFn) -> PackedCase:
    heads_k = draw(st.integers(1, 3))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=5)
    )
    return PackedCase(
        seqlens_q=tuple(q for q, _ in lengths),
        seqlens_k=tuple(k for _, k in lengths),
        beyond=draw(st.integers(0, 3)),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.floats(-2, 2)),
        with_tangent=draw(subsets("qkv")),
    )


@dataclass(frozen=True)
class Layout:
    """The memory layout of a tensor."""

    order: tuple[int, ...]  # of its dimensions, the slowest first
    step: int  # between the rows of the slowest
    expanded: bool  # whether heads, or the rows of a mask, have stride 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2:
            return x
        order = [dim for dim in self.order if dim < x.ndim]
        part = x[..., :1, :] if self.expanded else x
        # A copy, contiguous in this order.
        rows = part.permute(order).repeat_interleave(self.step, 0)[:: self.step]
        return rows.permute([order.index(dim) for dim in range(x.ndim)]).expand(x.shape)


any_layout = st.builds(
    Layout, st.permutations(range(4)).map(tuple), st.sampled_from([1, 2]), st.booleans()
)
# A tangent has the layout of its primal: torch requires it if the primal is expanded.
any_layouts = st.fixed_dictionaries(dict.fromkeys(INPUTS.values(), any_layout))
any_dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
any_tiling = st.fixed_dictionaries({"scores": st.integers(1, 500), "rows": st.integers(1, 6)})


# ----------------------------------------------------------------------------
# Properties


def everything_equals_the_naive_formula(
    case: Case | PackedCase, layouts: dict[str, Layout], tiling: dict[str, int]
) -> None:
    data = {name: layouts[name.removeprefix("t")](x) for name, x in case.data().items()}
    with small_tiles(**tiling):
        ours = outputs_and_gradients(case.ours, data)
    assert_close(ours, outputs_and_gradients(case.naive, data), tolerance=1e-11)


def out_tangent_and_gradients_equal_torch(
    case: Case, layouts: dict[str, Layout], tiling: dict[str, int], backend: str
) -> None:
    data = {name: layouts[name.removeprefix("t")](x) for name, x in case.data().items()}
    through = projection("out", "out_tangent")
    with jvp_attn.backend(backend), small_tiles(**tiling):
        ours = outputs_and_gradients(case.ours, data, through=through)
    torchs = outputs_and_gradients(case.torch_math, data, through=through)
    assert_close(part(ours, torchs), torchs, tolerance=1e-11)


def lower_precision_costs_one_rounding(
    case: Case, dtype: torch.dtype, tiling: dict[str, int]
) -> None:
    data = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.data().items()}
    through = projection(dtype=dtype)
    with small_tiles(**tiling):
        ours = outputs_and_gradients(case.ours, data, through=through)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in data.items()}
    expected = outputs_and_gradients(case.naive, exact, through=through)
    # A result whose terms cancel is zero up to the rounding of these terms. They are about 1; for
    # the gradient of a broadcast mask they are the gradient of the expanded mask.
    terms = {}
    if case.mask == "additive":
        everywhere = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
        apart = {x: y.expand(everywhere) if "mask" in x else y for x, y in exact.items()}
        terms = outputs_and_gradients(case.naive, apart, through=through)
    for name, x in expected.items():
        assert ours[name].dtype == (torch.float32 if name in ("lse", "mu") else dtype), name
        allowed = max(torch.finfo(ours[name].dtype).eps, 1e-4)
        least = 0.1 * max(x.numel(), 1) ** 0.5
        if "mask" in name:
            least = max(least, float(terms[name].norm()))
        assert relative_error(ours[name], x, least) <= allowed, name


PROPERTIES: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "dense, naive": (everything_equals_the_naive_formula, (cases(), any_layouts, any_tiling)),
    "packed, naive": (
        everything_equals_the_naive_formula,
        (packed_cases(), any_layouts, any_tiling),
    ),
    "dense, torch": (
        out_tangent_and_gradients_equal_torch,
        (cases(), any_layouts, any_tiling, st.sampled_from(BACKENDS)),
    ),
    "lower precision": (lower_precision_costs_one_rounding, (cases(), any_dtype, any_tiling)),
}
few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=400)


def check(name: str, amount: settings) -> None:
    holds, draws = PROPERTIES[name]
    amount(given(*draws)(holds))()


@pytest.mark.parametrize("name", ["dense, naive", "packed, naive"])
def test_a_few_random_cases(name: str) -> None:
    check(name, few)


# Not the emulated backend: with half precision, a result that cancels is only rounding error.
over_exact_backends = pytest.mark.parametrize("backend", ["cpu", "tiled"])


@over_exact_backends
@pytest.mark.parametrize("name", ["dense, torch", "lower precision"])
def test_a_few_random_cases_and_backends(name: str, backend: str) -> None:
    with jvp_attn.backend(backend):
        check(name, few)


@pytest.mark.slow
@over_exact_backends
@pytest.mark.parametrize("name", PROPERTIES)
def test_many_random_cases(name: str, backend: str) -> None:
    with jvp_attn.backend(backend):
        check(name, many)
