"""Sizes of 0 give the shapes and values of torch's attention, in every derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
    scaled_dot_product_attention,
)
from tests.jvp_attn import test_func_transforms as transforms
from tests.jvp_attn.attention_cases import (
    Case,
    Tensors,
    assert_close,
    named,
    outputs_and_gradients,
    projection,
    randn,
)
from tests.jvp_attn.packed_cases import PackedCase

EMPTY = {
    "batch": Case(batch=0),
    "seqlen_q": Case(seqlen_q=0),
    "seqlen_k": Case(seqlen_k=0),
    "heads": Case(heads=0, heads_k=0),
    "heads of q": Case(heads=0, heads_k=2),
    "head_dim": Case(head_dim=0),
    "head_dim_v": Case(head_dim_v=0),
    "both head dims": Case(head_dim=0, head_dim_v=0),
    "head_dim and seqlen_k": Case(head_dim=0, seqlen_k=0),
    "all": Case(0, 0, 0, 0, 0, 0, 0),
}
WITH = {
    "plain": {},
    "causal": {"causal": True},
    "boolean mask": {"mask": "boolean"},
    "additive mask with a tangent": {"mask": "additive", "with_tangent": "qkvm"},
    "scale": {"softmax_scale": 0.5},
}
CHOSEN = ["automatic", "tiled", "math"]
over_empty = pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY.keys())
over_backends = pytest.mark.parametrize("backend", CHOSEN)


@over_backends
@pytest.mark.parametrize("options", WITH.values(), ids=WITH.keys())
@over_empty
def test_out_tangent_and_gradients_are_torchs(
    case: Case, options: dict[str, Any], backend: str
) -> None:
    case = replace(case, **options)
    through = projection("out", "out_tangent")
    with jvp_attn.backend(backend):
        ours = outputs_and_gradients(case.ours, case.data(), through=through)
    torchs = outputs_and_gradients(case.torch_math, case.data(), through=through)
    assert_close({name: ours[name] for name in torchs}, torchs)


@pytest.mark.parametrize("options", WITH.values(), ids=WITH.keys())
@over_empty
def test_lse_and_its_derivatives_are_exact(case: Case, options: dict[str, Any]) -> None:
    case = replace(case, **options)
    with jvp_attn.backend("math"):
        expected = outputs_and_gradients(case.ours, case.data())
    assert_close(outputs_and_gradients(case.ours, case.data()), expected)


def test_without_a_head_dim_each_key_has_the_same_weight() -> None:
    q, k, v = Case(head_dim=0, heads_k=4).primals().values()
    out, lse = flash_attn_jvp(q, k, v, return_lse=True)
    assert_close({"out": out}, {"out": v.mean(1, keepdim=True).expand(out.shape)})
    assert_close({"lse": lse.exp()}, {"lse": torch.full_like(lse, k.shape[1])})


@pytest.mark.parametrize(
    "derivative",
    [
        transforms.jvp_of_grad,
        transforms.grad_of_grad,
        transforms.jacfwd_,
        transforms.jacrev_,
        transforms.vmap_of_grad_of_jvp,
        transforms.vmap_of_vmap,
    ],
    ids=lambda derivative: derivative.__name__.rstrip("_"),
)
@over_empty
def test_second_derivatives_are_exact(case: Case, derivative: transforms.Derivative) -> None:
    x, t = case.point_and_direction()
    ours = derivative(case.ours, x, t)
    assert_close(named(ours), named(derivative(case.naive, x, t)))


# ----------------------------------------------------------------------------
# The other functions


@over_backends
@pytest.mark.parametrize(
    "case",
    [
        PackedCase(heads=0, heads_k=0),
        PackedCase(heads=0, heads_k=2),
        PackedCase(head_dim=0),
        PackedCase(head_dim=0, causal=True, beyond=2),
        PackedCase(head_dim_v=0),
    ],
    ids=str,
)
def test_packed_sequences(case: PackedCase, backend: str) -> None:
    expected = outputs_and_gradients(case.naive, case.data())
    with jvp_attn.backend(backend):
        assert_close(outputs_and_gradients(case.ours, case.data()), expected)


@over_backends
@pytest.mark.parametrize("beyond", [0, 3])
def test_no_packed_sequences(beyond: int, backend: str) -> None:
    """Every row belongs to none: out 0, lse −inf and no gradient."""
    case = PackedCase((), (), beyond=beyond)
    with jvp_attn.backend(backend):
        results = outputs_and_gradients(case.ours, case.data())
    assert results["out"].shape == (beyond, case.heads, case.head_dim_v)
    assert (results.pop("lse") == -torch.inf).all()
    assert not any(x.any() for x in results.values())


@over_backends
@over_empty
def test_tangents_passed_by_hand(case: Case, backend: str) -> None:
    x, t = case.point_and_direction()
    (out, lse), (out_tangent, mu) = jvp(case.naive, x, t)
    expected = (out, out_tangent, lse, mu)
    with jvp_attn.backend(backend):
        assert_close(
            named(flash_attn_with_tangent(*x, *t, return_lse=True)),
            named(expected),
        )


@over_empty
def test_merged_parts(case: Case) -> None:
    part = case.ours(*case.primals().values())
    out, lse = merge_attention([part, part])
    assert (out.shape, lse.shape) == (part[0].shape, part[1].shape)
    assert_close({"out": out}, {"out": part[0]})


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "heads": ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 6), {}),
    "heads of query": ((2, 0, 5, 4), (2, 1, 7, 4), (2, 1, 7, 6), {}),
    "heads of query and value": ((2, 0, 5, 4), (2, 1, 7, 4), (2, 0, 7, 6), {}),
    "heads of query, grouped": ((2, 0, 5, 4), (2, 2, 7, 4), (2, 3, 7, 6), {"enable_gqa": True}),
    "all heads, grouped": ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 6), {"enable_gqa": True}),
    "head_dim": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 6), {"is_causal": True}),
    "head_dim without heads": ((5, 0), (7, 0), (7, 6), {}),
    "head_dim_v of many dimensions": ((3, 2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 0), {"scale": 2}),
    "leading dimension": ((2, 0, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 6), {}),
}


@over_backends
@pytest.mark.parametrize("name", SHAPES)
def test_torchs_interface(name: str, backend: str) -> None:
    *shapes, options = SHAPES[name]
    data = {
        f"{t}{x}": randn(*shape, seed=t + x)
        for x, shape in zip("qkv", shapes, strict=True)
        for t in ("", "t")
    }

    def derivatives(attention: Callable[..., Tensor]) -> dict[str, Tensor]:
        return outputs_and_gradients(lambda *qkv: (attention(*qkv, **options),), data)

    with jvp_attn.backend(backend):
        ours = derivatives(scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(ours, derivatives(F.scaled_dot_product_attention))


# ----------------------------------------------------------------------------
# vmap over no examples

Q, K, V = (randn(2, 5, 2, 4, seed=x) for x in "qkv")
NONE = Q.new_empty(0, *Q.shape)
MASK = randn(5, 5, seed="mask")
NO_MASKS = MASK.new_empty(0, *MASK.shape)
NO_LENGTHS = torch.empty(0, 2, dtype=torch.int32)
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)

Attention = Callable[..., Tensor]


def twice(f: Attention) -> Attention:
    """The tangent of f along its own arguments."""
    return lambda *x: jvp(f, x, x)[1]


def squares(x: Tensor) -> Tensor:
    return (x * x).sum()


def tangent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_with_tangent(q, k, v, q, k, v)[1]


def masked(q: Tensor, mask: Tensor) -> Tensor:
    return flash_attn_jvp(q, Q, Q, attn_mask=mask)


def packed(q: Tensor) -> Tensor:
    return flash_attn_varlen_jvp(q[0], Q[0], Q[0], ENDS, ENDS, 3, 3)[None]


def along(tq: Tensor | None, tk: Tensor | None, tv: Tensor | None) -> tuple[Tensor, ...]:
    return flash_attn_with_tangent(Q, K, V, tq, tk, tv, return_lse=True)


MAPPED: dict[str, Callable[[], Any]] = {
    "vmap": lambda: vmap(flash_attn_jvp)(NONE, NONE, NONE),
    "vmap of one argument": lambda: vmap(flash_attn_jvp, (0, None, None))(NONE, Q, Q),
    "vmap of an inner dimension": lambda: vmap(flash_attn_jvp, (2, None, None), 1)(
        NONE.movedim(0, 2), Q, Q
    ),
    "vmap of a mask": lambda: vmap(masked)(NONE, NO_MASKS),
    "vmap of a boolean mask": lambda: vmap(masked)(NONE, NO_MASKS > 0),
    "vmap of lengths": lambda: vmap(lambda n: flash_attn_jvp(Q, Q, Q, seqused_k=n))(NO_LENGTHS),
    "vmap of packed sequences": lambda: vmap(packed)(NONE),
    "vmap of torch's interface": lambda: vmap(scaled_dot_product_attention)(NONE, NONE, NONE),
    "vmap of tangents by hand": lambda: vmap(tangent)(NONE, NONE, NONE),
    "vmap of tangents of q": lambda: vmap(lambda t: along(t, None, None))(NONE),
    "vmap of tangents of k": lambda: vmap(lambda t: along(None, t, None))(NONE),
    "vmap of tangents of v": lambda: vmap(lambda t: along(None, None, t))(NONE),
    "vmap of directions": lambda: vmap(lambda *t: jvp(flash_attn_jvp, (Q, K, V), t))(*3 * [NONE]),
    "vmap of vmap": lambda: vmap(vmap(flash_attn_jvp))(*3 * [NONE[None].expand(3, *NONE.shape)]),
    "jvp of vmap": lambda: twice(vmap(flash_attn_jvp))(NONE, NONE, NONE),
    "vmap of jvp": lambda: vmap(twice(flash_attn_jvp))(NONE, NONE, NONE),
    "vmap of grad": lambda: vmap(grad(lambda q: squares(flash_attn_jvp(q, q, Q))))(NONE),
    "vmap of grad of a mask": lambda: vmap(grad(lambda q, m: squares(masked(q, m)), (0, 1)))(
        NONE, NO_MASKS
    ),
    "grad of vmap": lambda: grad(lambda q: squares(vmap(flash_attn_jvp)(q, q, q)))(NONE),
    "grad of vmap of jvp for what is shared": lambda: grad(
        lambda k: squares(vmap(twice(lambda q: flash_attn_jvp(q, k, k)))(NONE))
    )(Q),
    "vmap of grad of grad": lambda: vmap(
        grad(lambda q: squares(grad(lambda q: squares(flash_attn_jvp(q, q, q)))(q)))
    )(NONE),
    "jacobians of nothing": lambda: [
        derivative(lambda k: flash_attn_jvp(Q[:, :0], k, Q))(Q) for derivative in (jacfwd, jacrev)
    ],
}


@pytest.mark.parametrize("backend", ["automatic", "tiled"])
@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED.keys())
def test_vmap_over_no_examples_gives_the_shapes_of_the_formula(
    mapped: Callable[[], Any], backend: str
) -> None:
    with jvp_attn.backend("math"):
        expected = mapped()
    with jvp_attn.backend(backend):
        assert_close(named(mapped()), named(expected), tolerance=0)


def test_vmap_over_no_examples_gives_the_shapes_of_torch() -> None:
    def derivatives(attention: Attention) -> Tensors:
        f = vmap(attention)
        return (
            f(NONE, NONE, NONE),
            twice(f)(NONE, NONE, NONE),
            grad(lambda q: f(q, q, q).sum())(NONE),
        )

    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(F.scaled_dot_product_attention)
    assert_close(named(derivatives(scaled_dot_product_attention)), named(expected), tolerance=0)


def test_results_of_vmap_over_no_examples_require_grad() -> None:
    q = NONE.clone().requires_grad_()
    out = vmap(flash_attn_jvp)(q, q, q)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.shape == q.shape
