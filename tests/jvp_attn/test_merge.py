"""Merged attention over disjoint sets of keys equals attention over all of them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from jvp_attn import flash_attn_jvp, merge_attention
from tests.jvp_attn.attention_cases import (
    Attention,
    Case,
    Named,
    Tensors,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    projection,
    randn,
    relative_error,
)

QKV = (0, 1, 2)
CASES = {
    "full": Case(seqlen_q=3, seqlen_k=7),
    "causal": Case(seqlen_q=5, seqlen_k=7, causal=True),
    "causal, fully masked rows": Case(seqlen_q=9, seqlen_k=7, causal=True),
    "tangent of k": Case(seqlen_q=3, seqlen_k=7, with_tangent="k"),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cut(case: Case, seed: int) -> list[slice]:
    """The keys of the case, cut at random places into 1 to 4 parts."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(case.seqlen_k - 1, generator=generator)[: seed % 4] + 1
    edges = [0, *sorted(places.tolist()), case.seqlen_k]
    return [slice(a, b) for a, b in pairwise(edges)]


def part_of(case: Case, keys: slice) -> Attention:
    """Attention over these keys alone; with a causal mask, some rows may have none of them."""
    visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    visible = visible.tril(case.seqlen_k - case.seqlen_q)[:, keys] if case.causal else None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_jvp(q, k[:, keys], v[:, keys], attn_mask=visible, return_lse=True)

    return attention


def merged(case: Case, seed: int) -> Attention:
    attentions = [part_of(case, keys) for keys in cut(case, seed)]
    return lambda q, k, v: merge_attention([f(q, k, v) for f in attentions])


@over_cases
@pytest.mark.parametrize("seed", range(8))
def test_values_tangents_and_gradients_equal_attention_over_all_keys(case: Case, seed: int) -> None:
    data = case.data()
    ours = outputs_and_gradients(merged(case, seed), data)
    assert_close(ours, outputs_and_gradients(case.naive, data))


def jvp_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return jvp(grad(lambda *x: energy(f(*x)), QKV), x, t)


def grad_of_grad(f: Attention, x: Tensors, t: Tensors) -> Any:
    return grad(lambda *x: energy(grad(lambda *x: energy(f(*x)), QKV)(*x)), QKV)(*x)


@pytest.mark.parametrize("derivative", [jvp_of_grad, grad_of_grad])
@pytest.mark.parametrize("case", [CASES["full"], CASES["causal"]], ids=["full", "causal"])
def test_second_derivatives_equal_attention_over_all_keys(case: Case, derivative: Any) -> None:
    x, t = case.point_and_direction()
    assert_close(named(derivative(merged(case, 3), x, t)), named(derivative(case.naive, x, t)))


def random_parts(number: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Random out and lse; any values are valid."""
    return [
        (
            randn(2, 3, 4, 2, seed=f"out {i}", dtype=dtype),
            randn(2, 4, 3, seed=f"lse {i}", dtype=torch.promote_types(dtype, torch.float32)),
        )
        for i in range(number)
    ]


def pairs(tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def test_merging_is_associative() -> None:
    a, b, c = random_parts(3)
    stepwise = merge_attention([merge_attention([a, b]), c])
    assert_close(named(stepwise), named(merge_attention([a, b, c])))


def test_merging_one_part_returns_it_bit_for_bit() -> None:
    part = random_parts(1)[0]
    assert_close(named(merge_attention([part])), named(part), 0)


def test_packed_sequences_merge_as_batches_do() -> None:
    parts = random_parts(3)
    out, lse = merge_attention([(out[0], lse[0]) for out, lse in parts])
    expected, expected_lse = merge_attention(parts)
    assert_close({"out": out, "lse": lse}, {"out": expected[0], "lse": expected_lse[0]}, 0)


def test_a_batch_of_parts_merges_under_vmap() -> None:
    (out, lse), other, _ = random_parts(3)
    results = vmap(lambda *part: merge_attention([part, other]), in_dims=(2, 1), out_dims=(0, 0))(
        torch.stack([out, 2 * out], 2), torch.stack([lse, 2 * lse], 1)
    )
    each = [merge_attention([(a * out, a * lse), other]) for a in (1, 2)]
    assert_close(named(results), named(tuple(torch.stack(x) for x in zip(*each, strict=True))), 0)


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_derivatives_equal_finite_differences_for_any_size_of_lse(shift: float) -> None:
    """exp(lse) is 0 or infinite; the shift that keeps it finite must not change a derivative."""
    parts = [(out[:1, :2, :2], lse[:1, :2, :2]) for out, lse in random_parts(3)]
    tensors = tuple(x.clone().requires_grad_() for part in parts for x in part)

    def shifted(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_attention([(out, lse + shift) for out, lse in pairs(tensors)])
        return out, lse - shift

    assert gradcheck(shifted, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(shifted, tensors, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_with_all_the_weight_determines_the_result(place: int) -> None:
    """The ratio of the weights overflows float64."""
    (out, lse), light, _ = random_parts(3)
    parts = [light]
    parts.insert(place, (out, lse + 1000))
    merged, alone = values_and_derivatives(parts), values_and_derivatives([parts[place]])
    for name, x in alone.items():
        assert torch.equal(merged[name.replace("0", str(place))], x), name


# ----------------------------------------------------------------------------
# Parts without keys


def absent(part: tuple[Tensor, Tensor], value: float) -> tuple[Tensor, Tensor]:
    """A part without keys, whose out has any value."""
    return torch.full_like(part[0], value), torch.full_like(part[1], -torch.inf)


def values_and_derivatives(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of the merged parts: out, lse, their tangents, and the gradients through all of these.

    Tangents are 1; those of a number that is not finite are that number.
    """
    leaves = {
        f"{kind}{name}{i}": y.clone().requires_grad_()
        for i, part in enumerate(parts)
        for name, x in zip(("out", "lse"), part, strict=True)
        for kind, y in (("", x), ("t", torch.where(x.isfinite(), 1, x)))
    }

    def outputs(x: Named) -> Named:
        primals, tangents = (
            tuple(x[f"{kind}{name}{i}"] for i in range(len(parts)) for name in ("out", "lse"))
            for kind in ("", "t")
        )
        values, output_tangents = jvp(lambda *x: merge_attention(pairs(x)), primals, tangents)
        return dict(zip(("out", "lse", "tout", "mu"), (*values, *output_tangents), strict=True))

    results = outputs(leaves)
    gradients = torch.autograd.grad(projection()(results), list(leaves.values()))
    return {**results, **{f"grad_{x}": g for x, g in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize("value", [0.0, 7.0, torch.inf, torch.nan])
def test_a_part_without_keys_changes_nothing_and_gets_no_gradient(value: float) -> None:
    first, second, third = random_parts(3)
    with_absent = values_and_derivatives([first, second, absent(third, value)])
    for x in ("out2", "tout2", "lse2", "tlse2"):
        gradient = with_absent.pop(f"grad_{x}")
        assert torch.equal(gradient, torch.zeros_like(gradient)), x
    assert_close(with_absent, values_and_derivatives([first, second]), 0)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_rows_without_keys_in_any_part_are_zero(value: float) -> None:
    out, lse = random_parts(1)[0]
    dead = torch.zeros_like(lse, dtype=torch.bool)
    dead[0, 1, 2] = dead[1, 3, 0] = True
    of_out = dead.mT.unsqueeze(-1)
    part = (torch.where(of_out, value, out), torch.where(dead, -torch.inf, lse))
    results = values_and_derivatives([part, part])
    assert (results.pop("lse")[dead] == -torch.inf).all()
    for name, x in results.items():
        rows = x[of_out.expand_as(x)] if x.ndim == 4 else x[dead]
        assert torch.equal(rows, torch.zeros_like(rows)), name
        assert x.isfinite().all(), name


def test_nan_in_a_part_with_keys_reaches_the_result() -> None:
    (out, lse), second = random_parts(2)
    out[0, 1, 2, 0] = torch.nan
    lse[1, 3, 2] = torch.nan
    merged_out, merged_lse = merge_attention([(out, lse), second])
    assert torch.equal(merged_lse.isnan(), lse.isnan())
    assert torch.equal(merged_out.isnan(), out.isnan() | lse.isnan().mT.unsqueeze(-1))


# ----------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["plain", "v of mean 3"])
def test_half_precision_has_at_most_twice_the_error_of_attention_over_all_keys(
    dtype: torch.dtype, offset: float
) -> None:
    case = Case(seqlen_q=16, seqlen_k=64, head_dim=16, head_dim_v=16)
    data = {**case.data(), "v": case.data()["v"] + offset}
    data = {name: x.to(dtype) for name, x in data.items()}
    in_float64 = {name: x.double() for name, x in data.items()}
    through = projection("out", "out_tangent", dtype=dtype)
    exact = outputs_and_gradients(case.naive, in_float64, through=through)
    of_whole = outputs_and_gradients(case.naive, data, through=through)
    ours = outputs_and_gradients(merged(case, 3), data, through=through)
    for name, x in exact.items():
        allowed = max(2 * relative_error(of_whole[name], x), torch.finfo(dtype).eps / 2)
        assert relative_error(ours[name], x) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_out_is_rounded_once_to_the_dtype_of_the_parts(dtype: torch.dtype) -> None:
    parts = random_parts(4, dtype)
    exact, exact_lse = merge_attention([(out.double(), lse.double()) for out, lse in parts])
    out, lse = merge_attention(parts)
    assert_close({"lse": lse}, {"lse": exact_lse.to(parts[0][1].dtype)}, 1e-7)
    assert_close({"out": out}, {"out": exact.to(dtype)}, 0 if dtype.itemsize == 2 else 1e-7)


# ----------------------------------------------------------------------------
# Parts that do not fit

OUT, LSE = random_parts(1)[0]
MISFITS: dict[str, tuple[Any, type[Exception], str]] = {
    # what is wrong: the parts, the error, a part of its message
    "no part": ([], ValueError, "parts is empty: there must be at least one (out, lse)"),
    "a generator": (
        (part for part in [(OUT, LSE)]),
        TypeError,
        "parts must be a sequence of (out, lse), got generator",
    ),
    "a pair instead of pairs": (
        (OUT, LSE),
        TypeError,
        "parts[0] must be a tuple (out, lse) or (out, lse, lse_lo), got Tensor",
    ),
    "out alone": (
        [(OUT,)],
        TypeError,
        "must be tensors (out, lse) or (out, lse, lse_lo), got (Tensor)",
    ),
    "no lse": (
        [(OUT, LSE), (OUT, None)],
        TypeError,
        "parts[1] must be tensors (out, lse) or (out, lse, lse_lo), got (Tensor, NoneType)",
    ),
    "integers": (
        [(OUT.long(), LSE)],
        TypeError,
        "parts[0]: out has dtype torch.int64; supported are float16, bfloat16, float32, float64",
    ),
    "lse in half precision": (
        [(OUT.half(), LSE.half())],
        TypeError,
        "parts[0]: lse has dtype torch.float16 and out torch.float16; lse must be float32",
    ),
    "lse less precise than out": (
        [(OUT, LSE.float())],
        TypeError,
        "lse has dtype torch.float32 and out torch.float64",
    ),
    "out of two dimensions": (
        [(OUT[0, 0], LSE[0, 0])],
        ValueError,
        "out must have dimensions (..., seqlen_q, heads, head_dim_v), got shape (4, 2)",
    ),
    "lse transposed": (
        [(OUT, LSE.mT)],
        ValueError,
        "lse has shape (2, 3, 4) but out has (2, 3, 4, 2): lse must be (..., heads, seqlen_q), "
        "here (2, 4, 3)",
    ),
    "parts of two dtypes": (
        [(OUT.float(), LSE.float()), (OUT, LSE)],
        TypeError,
        "parts[1]: out has dtype torch.float64 but that of parts[0] has torch.float32",
    ),
    "parts of two shapes": (
        [(OUT, LSE), (OUT, LSE), (OUT[:, :1], LSE[..., :1])],
        ValueError,
        "parts[2]: out has shape (2, 1, 4, 2) but that of parts[0] has (2, 3, 4, 2)",
    ),
    "parts of two lengths of lse": (
        [(OUT, LSE), (OUT, LSE[..., :1])],
        ValueError,
        "parts[1]: lse has shape (2, 4, 1) but that of parts[0] has (2, 4, 3)",
    ),
    "parts on two devices": (
        [(OUT, LSE), (OUT.to("meta"), LSE.to("meta"))],
        ValueError,
        "parts[1]: out is on meta but out of parts[0] is on cpu; they must be on one device",
    ),
    "lse_lo in one part only": (
        [(OUT, LSE), (OUT, LSE, LSE)],
        TypeError,
        "parts[1] has 3 tensors and parts[0] has 2; either all parts have lse_lo or none",
    ),
    "lse_lo of another dtype": (
        [(OUT, LSE, LSE.float())],
        TypeError,
        "parts[0]: lse_lo has dtype torch.float32 and out torch.float64; lse_lo must be float32",
    ),
    "lse_lo transposed": (
        [(OUT, LSE, LSE.mT)],
        ValueError,
        "parts[0]: lse_lo has shape (2, 3, 4) but out has (2, 3, 4, 2): lse_lo must be",
    ),
    "parts of two lengths of lse_lo": (
        [(OUT, LSE, LSE), (OUT, LSE, LSE[..., :1])],
        ValueError,
        "parts[1]: lse_lo has shape (2, 4, 1) but that of parts[0] has (2, 4, 3)",
    ),
    "lse on another device": (
        [(OUT, LSE.to("meta"))],
        ValueError,
        "parts[0]: lse is on meta but out of parts[0] is on cpu; they must be on one device",
    ),
}


@pytest.mark.parametrize(("parts", "error", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_parts_that_do_not_fit_raise(parts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        merge_attention(parts)
