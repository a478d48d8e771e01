"""Mathematical identities of attention and its tangent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from tests.jvp_attn.attention_cases import (
    Case,
    assert_close,
    energy,
    named,
    part,
    randn,
    with_tangents,
)

CASES = {"full": Case(), "causal": Case(seqlen_q=9, causal=True)}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
TANGENTS = ("out_tangent", "mu")


def scores_with(case: Case, q: Tensor, k_vector: Tensor) -> Tensor:
    """The scores of every query with one vector as key, (batch, heads, seqlen_q)."""
    return (q @ k_vector).transpose(1, 2) * case.head_dim**-0.5


# ----------------------------------------------------------------------------
# What the tangent is


def test_outputs_equal_the_formulas() -> None:
    case = Case(heads=2, heads_k=2)
    x = case.data()
    q, k, v, tq, tk, tv = (x[name].transpose(1, 2) for name in ("q", "k", "v", "tq", "tk", "tv"))
    s = case.head_dim**-0.5
    p = torch.softmax(s * q @ k.mT, -1)
    t = s * (tq @ k.mT + q @ tk.mT)
    mu = (p * t).sum(-1)
    expected = {
        "out": (p @ v).transpose(1, 2),
        "lse": torch.logsumexp(s * q @ k.mT, -1),
        "out_tangent": ((p * (t - mu[..., None])) @ v + p @ tv).transpose(1, 2),
        "mu": mu,
    }
    assert_close(with_tangents(case.ours, x), expected)


@over_cases
def test_tangent_is_linear_in_the_direction(case: Case) -> None:
    x = case.data()
    other = {name: randn(*x[name].shape, seed=f"other {name}") for name in ("tq", "tk", "tv")}
    mixed = {name: 2 * x[name] - 3 * t for name, t in other.items()}
    one, two, both = (with_tangents(case.ours, {**x, **t}) for t in ({}, other, mixed))
    assert_close(part(both, TANGENTS), {name: 2 * one[name] - 3 * two[name] for name in TANGENTS})


@over_cases
def test_tangent_is_the_sum_of_those_along_q_k_and_v(case: Case) -> None:
    x = case.data()
    primals = case.primals()
    alone = [with_tangents(case.ours, {**primals, t: x[t]}) for t in ("tq", "tk", "tv")]
    total = {name: sum(outputs[name] for outputs in alone) for name in TANGENTS}
    assert_close(part(with_tangents(case.ours, x), TANGENTS), total)


@over_cases
def test_primal_is_the_same_with_and_without_a_tangent(case: Case) -> None:
    x = case.data()
    out, lse = case.ours(**case.primals())
    assert_close(part(with_tangents(case.ours, x), ("out", "lse")), {"out": out, "lse": lse}, 0)


@over_cases
def test_forward_and_reverse_mode_are_adjoint(case: Case) -> None:
    x, t = case.point_and_direction()

    def out(*x: Tensor) -> Tensor:
        return case.ours(*x)[0]

    primal, tangent = jvp(out, x, t)
    weights = randn(*primal.shape, seed="weights")
    gradients = vjp(out, *x)[1](weights)
    forward = (weights * tangent).sum()
    reverse = sum((g * t).sum() for g, t in zip(gradients, t, strict=True))
    assert_close({"": forward}, {"": reverse})


def test_the_three_hessian_vector_products_agree() -> None:
    case = Case()
    x, t = case.point_and_direction()

    def f(*x: Tensor) -> Tensor:
        return energy(case.ours(*x))

    every = (0, 1, 2)
    forward_over_reverse = jvp(grad(f, every), x, t)[1]
    reverse_over_forward = grad(lambda *x: jvp(f, x, t)[1], every)(*x)
    reverse_over_reverse = vjp(grad(f, every), *x)[1](t)
    assert_close(named(forward_over_reverse), named(reverse_over_forward))
    assert_close(named(forward_over_reverse), named(reverse_over_reverse))


# ----------------------------------------------------------------------------
# Symmetries


@over_cases
def test_adding_a_vector_to_all_keys_shifts_only_lse_and_mu(case: Case) -> None:
    x = case.data()
    c, tc = randn(case.head_dim, seed="c"), randn(case.head_dim, seed="tc")
    shifted = with_tangents(case.ours, {**x, "k": x["k"] + c, "tk": x["tk"] + tc})
    expected = with_tangents(case.ours, x)
    not_masked = expected["lse"] > -torch.inf
    t_shift = scores_with(case, x["tq"], c) + scores_with(case, x["q"], tc)
    expected["lse"] = expected["lse"] + scores_with(case, x["q"], c)
    expected["mu"] = expected["mu"] + t_shift * not_masked
    assert_close(shifted, expected)


def test_adding_a_vector_to_all_values_shifts_only_out() -> None:
    case = Case()
    x = case.data()
    c, tc = randn(case.head_dim_v, seed="c"), randn(case.head_dim_v, seed="tc")
    shifted = with_tangents(case.ours, {**x, "v": x["v"] + c, "tv": x["tv"] + tc})
    expected = with_tangents(case.ours, x)
    expected["out"] = expected["out"] + c
    expected["out_tangent"] = expected["out_tangent"] + tc
    assert_close(shifted, expected)


def test_the_order_of_keys_does_not_matter() -> None:
    case = Case()
    x = case.data()
    reordered = {name: y if "q" in name else y.flip(1) for name, y in x.items()}
    assert_close(with_tangents(case.ours, reordered), with_tangents(case.ours, x))


def test_grouped_heads_equal_repeated_keys() -> None:
    shared, repeated = Case(heads=6, heads_k=2), Case(heads=6, heads_k=6)
    x = shared.data()
    copies = {n: y if "q" in n else y.repeat_interleave(3, dim=2) for n, y in x.items()}
    assert_close(with_tangents(shared.ours, x), with_tangents(repeated.ours, copies))


def test_a_causal_row_equals_full_attention_over_its_keys() -> None:
    causal, full = Case(seqlen_q=4, seqlen_k=7, causal=True), Case()
    x = causal.data()
    outputs = with_tangents(causal.ours, x)
    for i in range(4):
        visible = {n: y[:, [i]] if "q" in n else y[:, : i + 7 - 4 + 1] for n, y in x.items()}
        row = {n: y[:, [i]] if "out" in n else y[:, :, [i]] for n, y in outputs.items()}
        assert_close(row, with_tangents(full.ours, visible))


def test_softmax_scale_equals_scaling_q() -> None:
    scaled, plain = Case(softmax_scale=0.3), Case(softmax_scale=1)
    x = scaled.data()
    factor = {**x, "q": 0.3 * x["q"], "tq": 0.3 * x["tq"]}
    assert_close(with_tangents(scaled.ours, x), with_tangents(plain.ours, factor))


def test_results_over_disjoint_keys_merge_into_the_result_over_all() -> None:
    case = Case(seqlen_k=9)
    x = case.data()
    parts = [
        with_tangents(case.ours, {n: y if "q" in n else y[:, keys] for n, y in x.items()})
        for keys in (slice(0, 2), slice(2, 3), slice(3, 9))
    ]
    lse = torch.logsumexp(torch.stack([p["lse"] for p in parts]), 0)
    weights = [(p["lse"] - lse).exp() for p in parts]
    mu = sum(w * p["mu"] for w, p in zip(weights, parts, strict=True))

    def each(row: Tensor) -> Tensor:
        """(batch, heads, seqlen_q) → (batch, seqlen_q, heads, 1)"""
        return row.transpose(1, 2)[..., None]

    merged = {
        "out": sum(each(w) * p["out"] for w, p in zip(weights, parts, strict=True)),
        "lse": lse,
        "out_tangent": sum(
            each(w) * (p["out_tangent"] + each(p["mu"] - mu) * p["out"])
            for w, p in zip(weights, parts, strict=True)
        ),
        "mu": mu,
    }
    assert_close(merged, with_tangents(case.ours, x))
