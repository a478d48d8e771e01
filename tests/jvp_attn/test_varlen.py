"""Packed sequences give the values and derivatives of each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

import jvp_attn
from jvp_attn import flash_attn_varlen_jvp
from tests.jvp_attn.attention_cases import (
    BACKENDS,
    Case,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    part,
    peak_and_largest_allocation,
    projection,
    randn,
    small_tiles,
    with_tangents,
)
from tests.jvp_attn.packed_cases import PackedCase

CASES = {
    "one sequence": PackedCase((5,), (7,)),
    "one token": PackedCase((1,), (1,)),
    "four sequences": PackedCase(),
    "causal": PackedCase((3, 5, 2), (6, 5, 9), causal=True),
    "causal, fully masked rows": PackedCase((3, 5, 4), (1, 5, 2), causal=True),
    "a key head for each head": PackedCase(heads=3, heads_k=3),
    "one key head for 6": PackedCase(heads=6, heads_k=1, causal=True),
    "own scale": PackedCase(softmax_scale=-0.7),
    "the first is empty": PackedCase((0, 3, 5), (0, 4, 6)),
    "one in the middle is empty": PackedCase((3, 0, 5), (4, 0, 6), causal=True),
    "the last is empty": PackedCase((3, 5, 0), (4, 6, 0)),
    "empty ones one after another": PackedCase((0, 0, 3, 0, 0, 2), (0, 0, 4, 0, 0, 6)),
    "queries without keys": PackedCase((3, 2, 4), (4, 0, 6)),
    "the first queries without keys": PackedCase((3, 2), (0, 5), causal=True),
    "keys without queries": PackedCase((3, 0, 4), (4, 2, 6)),
    "tokens after the last": PackedCase(beyond=3),
    "tokens after the last, causal": PackedCase(beyond=2, causal=True),
    "tokens after empty sequences": PackedCase((3, 0), (4, 0), beyond=5),
    "all are empty": PackedCase((0, 0), (0, 0), beyond=4),
    "tangent of q": PackedCase(with_tangent="q"),
    "tangents of k, v": PackedCase(with_tangent="kv", beyond=1),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
over_backends = pytest.mark.parametrize("backend", BACKENDS)
SMALL_TILES = {"scores": 12, "rows": 4}  # of two rows and two query heads each


@over_cases
@over_backends
def test_packed_sequences_equal_each_sequence_alone(backend: str, case: PackedCase) -> None:
    data = case.data()
    with jvp_attn.backend(backend), small_tiles(**SMALL_TILES):
        packed = outputs_and_gradients(case.ours, data)
    assert_close(packed, outputs_and_gradients(case.each_alone, data))


@over_cases
def test_out_its_tangent_and_gradients_through_both_equal_torch(case: PackedCase) -> None:
    data = case.data()
    through = projection("out", "out_tangent")
    with small_tiles(**SMALL_TILES):
        packed = outputs_and_gradients(case.ours, data, through=through)
    torchs = outputs_and_gradients(case.torch_math, data, through=through)
    assert_close(part(packed, torchs), torchs)


def test_a_sequence_is_independent_of_the_others() -> None:
    """Bit for bit."""
    case = PackedCase(causal=True, beyond=2)
    data = case.data()
    others = {name: x.clone() for name, x in data.items()}
    for name, x in others.items():
        first, last = (3, 8) if "q" in name else (6, 8)  # the second sequence stays
        x[:first] = 1e4
        x[last:] = -1e4

    def through_the_second(outputs: Any) -> Tensor:
        return projection()({n: x[3:8] if "out" in n else x[:, 3:8] for n, x in outputs.items()})

    expected, found = (
        outputs_and_gradients(case.ours, x, through=through_the_second) for x in (data, others)
    )
    for name, x in expected.items():
        second = slice(6, 8) if name[-1] in "kv" else slice(3, 8)
        where = (slice(None), second) if name in ("lse", "mu") else (second,)
        assert torch.equal(found[name][where], x[where]), name
        if name.startswith("grad"):
            assert (found[name][: second.start] == 0).all(), name
            assert (found[name][second.stop :] == 0).all(), name


def test_tokens_after_the_last_sequence_give_zero_and_no_derivative_even_if_nonfinite() -> None:
    case = PackedCase(beyond=3)
    data = case.data()
    for x in data.values():
        x[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf]).double()[:, None, None]
    found = outputs_and_gradients(case.ours, data)
    assert (found.pop("lse")[:, -3:] == -torch.inf).all()
    assert (found.pop("mu")[:, -3:] == 0).all()
    for name, x in found.items():
        assert (x[-3:] == 0).all(), name
        assert x.isfinite().all(), name


@over_backends
@pytest.mark.parametrize("tokens", [0, 4])
def test_the_number_of_sequences_may_be_0(tokens: int, backend: str) -> None:
    case = PackedCase((), (), beyond=tokens)
    with jvp_attn.backend(backend):
        found = outputs_and_gradients(case.ours, case.data())
    expected = {
        "out": torch.zeros(tokens, 4, 6, dtype=case.dtype),
        "lse": torch.full((4, tokens), -torch.inf, dtype=case.dtype),
        "out_tangent": torch.zeros(tokens, 4, 6, dtype=case.dtype),
        "mu": torch.zeros(4, tokens, dtype=case.dtype),
    }
    gradients = {f"grad_{name}": torch.zeros_like(x) for name, x in case.data().items()}
    assert_close(found, expected | gradients, tolerance=0)


def test_max_seqlens_may_be_longer_than_any_sequence() -> None:
    case = PackedCase(causal=True)

    def longer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_varlen_jvp(
            q, k, v, *case.cu_seqlens(), 50, 60, causal=True, return_lse=True
        )

    data = case.data()
    assert_close(outputs_and_gradients(longer, data), outputs_and_gradients(case.ours, data))


def test_sequences_of_equal_length_equal_a_batch() -> None:
    batched = Case(3, 5, 7, causal=True)
    packed = PackedCase((5,) * 3, (7,) * 3, causal=True)

    def through_packing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = packed.ours(*(x.flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, (3, 5)), lse.unflatten(1, (3, 5)).transpose(0, 1)

    data = batched.data()
    assert_close(
        outputs_and_gradients(through_packing, data), outputs_and_gradients(batched.ours, data)
    )


# ----------------------------------------------------------------------------
# Second derivatives

SECOND_ORDER = {
    name: CASES[name]
    for name in (
        "four sequences",
        "causal, fully masked rows",
        "one in the middle is empty",
        "queries without keys",
        "tokens after the last",
    )
}
over_second_order = pytest.mark.parametrize("case", SECOND_ORDER.values(), ids=SECOND_ORDER.keys())


def energy_of(attention: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function with derivatives of every order, also if lse is −inf."""
    return lambda *x: energy(y.masked_fill(y == -torch.inf, 0) for y in attention(*x))


@over_second_order
def test_hessian_vector_products_equal_the_naive_formula(case: PackedCase) -> None:
    ours, expected = (
        jvp(grad(energy_of(attention), argnums=(0, 1, 2)), *case.point_and_direction())
        for attention in (case.ours, case.naive)
    )
    assert_close(named(ours), named(expected), tolerance=1e-11)


@over_second_order
def test_gradients_of_gradient_penalties_equal_the_naive_formula(case: PackedCase) -> None:
    def penalty(attention: Callable[..., Any]) -> Any:
        leaves = [x.requires_grad_() for x in case.primals().values()]
        gradients = torch.autograd.grad(energy_of(attention)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    assert_close(named(penalty(case.ours)), named(penalty(case.naive)), tolerance=1e-11)


# ----------------------------------------------------------------------------
# vmap, over all arguments but cu_seqlens


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, -1), (None, None, 0)])
def test_vmap_over_primals(in_dims: tuple[int | None, ...]) -> None:
    case = PackedCase((3, 0, 5), (4, 2, 6), beyond=2, causal=True)
    data = case.data()
    many = {
        name: x if dim is None else randn(3, *x.shape, seed=name).movedim(0, dim)
        for (name, x), dim in zip(case.primals().items(), in_dims, strict=True)
    }

    def derived(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return with_tangents(case.ours, {**data, "q": q, "k": k, "v": v})

    mapped = vmap(derived, in_dims)(*many.values())
    for i in range(3):
        one = (
            x if dim is None else x.select(dim, i)
            for x, dim in zip(many.values(), in_dims, strict=True)
        )
        assert_close({name: x[i] for name, x in mapped.items()}, derived(*one))


def test_vmap_of_gradients() -> None:
    case = PackedCase((3, 0, 5), (4, 2, 6), beyond=2)
    primals = [randn(2, *x.shape, seed=name) for name, x in case.primals().items()]
    gradient = grad(energy_of(case.ours), argnums=(0, 1, 2))
    mapped = vmap(gradient)(*primals)
    for i in range(2):
        assert_close(named([x[i] for x in mapped]), named(gradient(*(x[i] for x in primals))))


def test_vmap_over_tangents_only() -> None:
    case = PackedCase((2, 0, 3), (2, 2, 1), beyond=1, head_dim=2, head_dim_v=2)
    primals = tuple(case.primals().values())
    columns = jacfwd(case.ours, argnums=(0, 1, 2))(*primals)
    expected = jacfwd(case.naive, argnums=(0, 1, 2))(*primals)
    assert_close(named(columns), named(expected))


# ----------------------------------------------------------------------------
# Strides and memory


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["heads first", "head_dim before heads", "every other token", "one token for all"],
)
def test_strides_change_no_result_and_inputs_are_never_modified(
    layout: Callable[[Tensor], Tensor],
) -> None:
    case = PackedCase((3, 0, 5), (4, 2, 6), beyond=2, causal=True)
    data = {name: layout(x) for name, x in case.data().items()}
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in data.items()}
    versions = {name: x._version for name, x in data.items()}
    found = outputs_and_gradients(case.ours, data)
    assert_close(found, outputs_and_gradients(case.ours, dense))
    assert_close(data, dense, tolerance=0)
    assert {name: x._version for name, x in data.items()} == versions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_tangent_has_the_strides_of_its_primal(dtype: torch.dtype) -> None:
    outputs = with_tangents(PackedCase().ours, replace(PackedCase(), dtype=dtype).data())
    assert outputs["out"].dtype == outputs["out_tangent"].dtype == dtype
    assert outputs["out"].stride() == outputs["out_tangent"].stride()
    assert outputs["lse"].dtype == outputs["mu"].dtype
    assert outputs["lse"].stride() == outputs["mu"].stride()


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    case = PackedCase((8,) * 64, (8,) * 64, heads=2, heads_k=1, head_dim=4, head_dim_v=4)
    data = replace(case, dtype=torch.float32).data()
    _, largest = peak_and_largest_allocation(lambda: outputs_and_gradients(case.ours, data))
    tokens = 8 * 64
    assert largest < tokens * tokens * 4 / 16
