"""Values, tangents and gradients equal those of softmax(s Q Kᵀ) V for all kinds of shapes."""

import pytest
from torch import Tensor

import jvp_attn
from jvp_attn import flash_attn_with_tangent
from tests.jvp_attn.attention_cases import (
    BACKENDS,
    Attention,
    Case,
    Named,
    assert_close,
    outputs_and_gradients,
    projection,
    with_tangents,
    without_tangents,
)

CASES = {
    "one query, one key": Case(seqlen_q=1, seqlen_k=1),
    "one query": Case(seqlen_q=1, seqlen_k=9),
    "one key": Case(seqlen_q=9, seqlen_k=1),
    "self-attention": Case(seqlen_q=8, seqlen_k=8, heads=2, head_dim=4, head_dim_v=4),
    "long": Case(batch=1, seqlen_q=130, seqlen_k=257, heads=2, head_dim=16),
    "causal": Case(seqlen_q=6, seqlen_k=6, causal=True),
    "causal, more keys": Case(seqlen_q=4, seqlen_k=9, causal=True),
    "causal, fully masked rows": Case(seqlen_q=9, seqlen_k=4, causal=True),
    "causal, one query": Case(seqlen_q=1, seqlen_k=5, causal=True),
    "causal, one key": Case(seqlen_q=5, seqlen_k=1, causal=True),
    "a key head for each head": Case(heads=3, heads_k=3),
    "one key head for 8": Case(heads=8, heads_k=1),
    "2 key heads for 16, causal": Case(heads=16, heads_k=2, causal=True),
    "head_dim 1": Case(head_dim=1, head_dim_v=1),
    "head_dim 72": Case(head_dim=72, head_dim_v=80),
    "head_dim 255": Case(head_dim=255, head_dim_v=1),
    "head_dim 256": Case(head_dim=256, head_dim_v=256),
    "own scale": Case(softmax_scale=0.7),
    "negative scale": Case(softmax_scale=-2),
    "scale 0": Case(softmax_scale=0),
    "tangent of q": Case(with_tangent="q"),
    "tangent of k": Case(with_tangent="k"),
    "tangent of v": Case(with_tangent="v"),
    "tangents of q, k": Case(with_tangent="qk"),
    "tangents of q, v": Case(with_tangent="qv"),
    "tangents of k, v, causal": Case(with_tangent="kv", seqlen_q=9, causal=True),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@over_cases
def test_outputs_tangents_and_gradients_equal_the_naive_formula(case: Case) -> None:
    data = case.data()
    assert_close(outputs_and_gradients(case.ours, data), outputs_and_gradients(case.naive, data))


@over_cases
def test_out_its_tangent_and_gradients_through_both_equal_torch(case: Case) -> None:
    data = case.data()
    ours = outputs_and_gradients(case.ours, data, through=projection("out", "out_tangent"))
    del ours["lse"], ours["mu"]  # torch has no such outputs
    assert_close(ours, outputs_and_gradients(case.torch_math, data))


@pytest.mark.parametrize("case", [Case(), Case(seqlen_q=9, causal=True)], ids=["full", "causal"])
@pytest.mark.parametrize("names", [("out",), ("lse",), ("out", "lse")], ids="+".join)
def test_gradients_without_tangents_equal_the_naive_formula(
    case: Case, names: tuple[str, ...]
) -> None:
    data = case.primals()
    ours, naive = (
        outputs_and_gradients(f, data, evaluate=without_tangents, through=projection(*names))
        for f in (case.ours, case.naive)
    )
    assert_close(ours, naive)


@pytest.mark.parametrize("with_tangent", ["qkv", "q", "kv"])
@pytest.mark.parametrize("name", ["out", "lse", "out_tangent", "mu"])
def test_gradients_through_each_output_alone_equal_the_naive_formula(
    name: str, with_tangent: str
) -> None:
    case = Case(with_tangent=with_tangent, seqlen_q=9, causal=True)
    ours, naive = (
        outputs_and_gradients(f, case.data(), through=projection(name))
        for f in (case.ours, case.naive)
    )
    assert_close(ours, naive)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "tq", "tk", "tv", "q tv", "k tk v"])
def test_leaving_out_gradients_does_not_change_the_others(wanted: str) -> None:
    case = Case()
    data, names = case.data(), wanted.split()

    def evaluate(attention: Attention, leaves: Named) -> dict[str, Tensor]:
        constant = {x: leaf if x in names else leaf.detach() for x, leaf in leaves.items()}
        return with_tangents(attention, constant)

    some = outputs_and_gradients(case.ours, data, evaluate=evaluate)
    every = outputs_and_gradients(case.ours, data)
    assert_close({x: some[f"grad_{x}"] for x in names}, {x: every[f"grad_{x}"] for x in names})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_tangent", ["qkv", "q", "kv"])
def test_flash_attn_with_tangent_equals_jvp(with_tangent: str, backend: str) -> None:
    case = Case(with_tangent=with_tangent, seqlen_q=9, causal=True, softmax_scale=0.3)

    def by_hand(_: Attention, x: Named) -> dict[str, Tensor]:
        tangents = (x.get("tq"), x.get("tk"), x.get("tv"))
        with jvp_attn.backend(backend):
            out, out_tangent, lse, mu = flash_attn_with_tangent(
                *(x["q"], x["k"], x["v"], *tangents),
                softmax_scale=0.3,
                causal=True,
                return_lse=True,
            )
        return {"out": out, "lse": lse, "out_tangent": out_tangent, "mu": mu}

    data = case.data()
    expected = outputs_and_gradients(case.naive, data)
    assert_close(outputs_and_gradients(case.ours, data, evaluate=by_hand), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_input_tangents_the_tangent_is_zero(backend: str) -> None:
    case = Case()
    primals = case.primals()
    with jvp_attn.backend(backend):
        out, out_tangent, lse, mu = flash_attn_with_tangent(**primals, return_lse=True)
    assert_close({"out": out, "lse": lse}, without_tangents(case.naive, primals))
    assert_close({"tangent": out_tangent, "mu": mu}, {"tangent": 0 * out, "mu": 0 * lse}, 0)
