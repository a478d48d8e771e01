"""A masked key never affects a row; NaN in a key that it attends to does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import jvp_attn
from tests.jvp_attn.attention_cases import (
    BACKENDS,
    Case,
    Named,
    assert_close,
    outputs_and_gradients,
    part,
    projection,
    rows_of,
    small_tiles,
    with_tangents,
)

over_backends = pytest.mark.parametrize("backend", BACKENDS)
OUTPUTS = ("out", "lse", "out_tangent", "mu")
GRADIENTS = tuple(f"grad_{name}" for name in ("q", "k", "v", "tq", "tk", "tv"))
over_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)


# ----------------------------------------------------------------------------
# Masked keys


def masked_by(how: str, case: Case) -> tuple[Case, Named]:
    """The case and its data, where row i attends to key j if j ≤ i + seqlen_k − seqlen_q."""
    if how == "causal":
        case = replace(case, causal=True)
        return case, case.data()
    diagonal = case.seqlen_k - case.seqlen_q
    visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool).tril(diagonal)
    bias = torch.zeros(visible.shape, dtype=case.dtype).masked_fill(~visible, -torch.inf)
    return case, case.data() | {"attn_mask": visible if how == "boolean mask" else bias}


over_mask_kinds = pytest.mark.parametrize("how", ["causal", "boolean mask", "additive mask"])


@over_mask_kinds
@over_dtypes
def test_masked_keys_may_hold_any_finite_number(dtype: torch.dtype, how: str) -> None:
    case, clean = masked_by(how, Case(seqlen_q=8, seqlen_k=8, dtype=dtype))
    for name in ("q", "tq"):
        clean[name][:, 5:] = 0  # rows that attend to these keys: 0 · garbage = 0
    garbage = {name: x.clone() for name, x in clean.items()}
    for name in ("k", "v", "tk", "tv"):
        # The last row sums three of these: a quarter each does not overflow.
        garbage[name][:, 5:] = torch.finfo(dtype).max / 4 * clean[name][:, 5:].sign()

    def through_the_first_rows(outputs: Named) -> Tensor:
        return projection()(rows_of(outputs, slice(5)))

    with small_tiles(
        scores=1, rows=6
    ):  # tiles of 3 rows mix rows that attend to garbage and rows that do not
        expected, found = (
            outputs_and_gradients(case.ours, data, through=through_the_first_rows)
            for data in (clean, garbage)
        )
    assert_close(
        rows_of(part(found, OUTPUTS), slice(5)), rows_of(part(expected, OUTPUTS), slice(5))
    )
    assert_close(part(found, GRADIENTS), part(expected, GRADIENTS))
    for name in ("grad_k", "grad_v", "grad_tk", "grad_tv"):
        assert (found[name][:, 5:] == 0).all(), name


@pytest.mark.parametrize(
    ("name", "affected"),
    [
        ("q", {"out", "lse", "out_tangent", "mu"}),
        ("k", {"out", "lse", "out_tangent", "mu"}),
        ("v", {"out", "out_tangent"}),
        ("tq", {"out_tangent", "mu"}),
        ("tk", {"out_tangent", "mu"}),
        ("tv", {"out_tangent"}),
    ],
)
def test_nan_reaches_every_row_that_attends_to_it(name: str, affected: set[str]) -> None:
    case = Case(seqlen_q=6, seqlen_k=6, causal=True)
    data = case.data()
    data[name][:, 2:3] = torch.nan
    outputs = with_tangents(case.ours, data)
    attending = slice(2, 3) if "q" in name else slice(2, None)
    assert {n for n, x in rows_of(outputs, attending).items() if x.isnan().all()} == affected
    assert {n for n, x in outputs.items() if x.isnan().any()} == affected


# ----------------------------------------------------------------------------
# Fully masked rows

DEAD = Case(seqlen_q=9, seqlen_k=4)  # five of nine rows


@over_backends
@over_mask_kinds
@over_dtypes
def test_fully_masked_rows_have_out_zero_lse_minus_infinity_and_no_derivative(
    dtype: torch.dtype, how: str, backend: str
) -> None:
    case, data = masked_by(how, replace(DEAD, dtype=dtype))
    with jvp_attn.backend(backend), small_tiles(scores=1, rows=4):
        found = outputs_and_gradients(case.ours, data)
    dead = rows_of(part(found, OUTPUTS), slice(5))
    assert (dead["lse"] == -torch.inf).all()
    for zero in (dead["out"], dead["out_tangent"], dead["mu"]):
        assert (zero == 0).all()
    for name in GRADIENTS:
        assert found[name].isfinite().all(), name
    for name in ("grad_q", "grad_tq"):
        assert (found[name][:, :5] == 0).all(), name
        assert (found[name][:, 5:] != 0).any(), name


@over_backends
@over_mask_kinds
def test_fully_masked_rows_pass_no_cotangent_on_even_if_it_is_nan(how: str, backend: str) -> None:
    case, data = masked_by(how, DEAD)

    def through(outputs: Named) -> Tensor:
        alive = projection()(rows_of(outputs, slice(5, None)))
        normalised = [x / x.norm() for x in rows_of(outputs, slice(5)).values()]  # 0 / 0
        return alive + sum(x.nansum() for x in normalised)

    with jvp_attn.backend(backend), small_tiles(scores=1, rows=4):
        found, expected = (
            outputs_and_gradients(case.ours, data, through=f)
            for f in (through, lambda outputs: projection()(rows_of(outputs, slice(5, None))))
        )
    assert_close(found, expected)


# ----------------------------------------------------------------------------
# Sizes of zero


@over_backends
@over_dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_batch_queries_or_keys_may_have_size_0(
    empty: str, mask: str | None, causal: bool, dtype: torch.dtype, backend: str
) -> None:
    letters = "qkvm" if mask == "additive" else "qkv"
    case = Case(causal=causal, mask=mask, with_tangent=letters, dtype=dtype)
    case = replace(case, **{empty: 0})
    with jvp_attn.backend(backend):
        found = outputs_and_gradients(case.ours, case.data())
    out_shape = (case.batch, case.seqlen_q, case.heads, case.head_dim_v)
    lse_shape = (case.batch, case.heads, case.seqlen_q)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    expected = {
        "out": torch.zeros(out_shape, dtype=dtype),
        "lse": torch.full(lse_shape, -torch.inf, dtype=lse_dtype),
        "out_tangent": torch.zeros(out_shape, dtype=dtype),
        "mu": torch.zeros(lse_shape, dtype=lse_dtype),
    }
    gradients = {
        f"grad_{name}": torch.zeros_like(x)
        for name, x in case.data().items()
        if x.is_floating_point()
    }
    assert_close(found, expected | gradients, tolerance=0)
