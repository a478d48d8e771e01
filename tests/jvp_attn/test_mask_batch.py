"""Masks that vary along some dimensions of the batch and are broadcast along others.

A pair bias is one: (batch, 1, heads, seqlen, seqlen) for queries of (batch, rows, heads, seqlen,
head_dim). Everything equals attention with the expanded mask, by the naive formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

import jvp_attn
from jvp_attn import scaled_dot_product_attention
from tests.jvp_attn.attention_cases import (
    Attention,
    Named,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    peak_and_largest_allocation,
    randn,
    small_tiles,
)
from tests.jvp_attn.operator_calls import OperatorCalls

HEADS, SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 2, 5, 7, 4, 6

Shape = tuple[int, ...]

# The batch of q, k and v, and that of the mask.
BROADCASTS: dict[str, tuple[Shape, Shape]] = {
    "along the last": ((2, 3), (2, 1)),
    "along the first": ((2, 3), (1, 3)),
    "along the middle": ((2, 3, 2), (2, 1, 2)),
    "along the first and last": ((2, 3, 2), (1, 3, 1)),
    "along two apart": ((2, 2, 3, 2), (2, 1, 3, 1)),
    "along two between": ((2, 2, 2, 2), (2, 1, 1, 2)),
}
over_broadcasts = pytest.mark.parametrize(
    ("batch", "of_mask"), BROADCASTS.values(), ids=BROADCASTS.keys()
)
over_some = pytest.mark.parametrize(
    ("batch", "of_mask"),
    [BROADCASTS[name] for name in ("along the last", "along the first", "along two apart")],
    ids=["along the last", "along the first", "along two apart"],
)
over_kinds = pytest.mark.parametrize("kind", ["boolean", "additive"])
over_heads = pytest.mark.parametrize("heads", [1, HEADS], ids=["all heads", "each head"])
# One example in a block, some examples with one entry of the mask, all examples.
over_tiles = pytest.mark.parametrize("scores", [50, 150, 10**6])


def random_data(batch: Shape, of_mask: Shape, kind: str = "additive") -> dict[str, Tensor]:
    """q, k, v, attn_mask, and tangents of those that are not boolean."""
    shapes = {
        "q": (*batch, HEADS, SEQLEN_Q, HEAD_DIM),
        "k": (*batch, HEADS, SEQLEN_K, HEAD_DIM),
        "v": (*batch, HEADS, SEQLEN_K, HEAD_DIM_V),
        "attn_mask": (*of_mask, SEQLEN_Q, SEQLEN_K),
    }
    data = {f"{t}{x}": randn(*shape, seed=t + x) for x, shape in shapes.items() for t in ("", "t")}
    visible = randn(*shapes["attn_mask"], seed="visible") > -0.5
    visible[..., 1, :] = False  # a fully masked row
    if kind == "boolean":
        del data["tattn_mask"]
        data["attn_mask"] = visible
    else:
        data["attn_mask"] = data["attn_mask"].masked_fill(~visible, -torch.inf)
    return data


def ours(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor]:
    return (scaled_dot_product_attention(q, k, v, attn_mask),)


def with_expanded_mask(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor]:
    """By the naive formula, which knows no mask that is shared by parts of a batch."""
    expanded = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    if expanded.dtype != torch.bool:
        expanded = expanded + 0  # in memory
    with jvp_attn.backend("math"):
        return ours(q, k, v, expanded)


# ----------------------------------------------------------------------------
# Values


@over_tiles
@over_heads
@over_kinds
@over_broadcasts
def test_outputs_tangents_and_gradients(
    batch: Shape, of_mask: Shape, kind: str, heads: int, scores: int
) -> None:
    data = random_data(batch, (*of_mask, heads), kind)
    with small_tiles(scores=scores, rows=4):
        found = outputs_and_gradients(ours, data)
    assert_close(found, outputs_and_gradients(with_expanded_mask, data))


@over_kinds
@over_broadcasts
def test_the_naive_formula_itself_broadcasts(batch: Shape, of_mask: Shape, kind: str) -> None:
    data = random_data(batch, (*of_mask, 1), kind)
    expected = outputs_and_gradients(with_expanded_mask, data)
    with jvp_attn.backend("math"):
        assert_close(outputs_and_gradients(ours, data), expected, tolerance=1e-14)


# ----------------------------------------------------------------------------
# Second derivatives


def point_and_direction(data: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(data[t + x] for x in ("q", "k", "v", "attn_mask")) for t in ("", "t"))


@over_some
def test_hessian_vector_products(batch: Shape, of_mask: Shape) -> None:
    point, direction = point_and_direction(random_data(batch, (*of_mask, 1)))

    def product_of(attention: Attention) -> dict[str, Tensor]:
        gradient = grad(lambda *x: energy(attention(*x)), argnums=(0, 1, 2, 3))
        return named(jvp(gradient, point, direction))

    assert_close(product_of(ours), product_of(with_expanded_mask), tolerance=1e-11)


@over_some
def test_gradients_of_gradient_penalties(batch: Shape, of_mask: Shape) -> None:
    point, _ = point_and_direction(random_data(batch, (*of_mask, 1)))

    def penalty(attention: Attention) -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in point]
        gradients = torch.autograd.grad(energy(attention(*leaves)), leaves, create_graph=True)
        loss = sum(0.1 * g.square().sum() for g in gradients)
        return named(torch.autograd.grad(loss, leaves))

    assert_close(penalty(ours), penalty(with_expanded_mask), tolerance=1e-11)


# ----------------------------------------------------------------------------
# vmap


def tangent(attention: Attention, q: Tensor, tq: Tensor, mask: Tensor, tmask: Tensor) -> Any:
    return jvp(lambda q, mask: attention(q, q, q, mask), (q, mask), (tq, tmask))


def gradients(attention: Attention, q: Tensor, tq: Tensor, mask: Tensor, tmask: Tensor) -> Any:
    def loss(*x: Tensor) -> Tensor:
        (out,), (tout,) = tangent(attention, *x)
        return energy((out, tout))

    return grad(loss, argnums=(0, 1, 2, 3))(q, tq, mask, tmask)


@pytest.mark.parametrize("derivative", [tangent, gradients])
@pytest.mark.parametrize(
    "mapped",
    [(0, 0, None, None), (None, None, 0, 0), (0, 0, 0, 0), (0, 0, None, 0)],
    ids=["q", "mask", "both", "q and the tangent of the mask"],
)
@pytest.mark.parametrize(("batch", "of_mask"), [((2, 3), (2, 1)), ((2, 3), (1, 3))], ids=str)
@pytest.mark.parametrize("size", [2, 7])
def test_vmap(
    size: int,
    batch: Shape,
    of_mask: Shape,
    mapped: tuple[int | None, ...],
    derivative: Callable[..., Any],
) -> None:
    shapes = 2 * ((*batch, HEADS, 3, 4),) + 2 * ((*of_mask, 1, 3, 3),)
    x = [
        randn(*(() if dim is None else (size,)), *shape, seed=str(i))
        for i, (shape, dim) in enumerate(zip(shapes, mapped, strict=True))
    ]
    found = vmap(lambda *x: derivative(ours, *x), mapped)(*x)
    each = [
        derivative(
            with_expanded_mask,
            *(y if dim is None else y[n] for y, dim in zip(x, mapped, strict=True)),
        )
        for n in range(size)
    ]
    assert_close(named(found), named(tree_map(lambda *y: torch.stack(y), *each)), tolerance=1e-11)


def test_vmap_of_vmap_over_masks_and_their_tangents() -> None:
    q = randn(2, 3, HEADS, 3, 4, seed="q")
    masks, tmasks = randn(2, 2, 1, 1, 3, 3, seed="masks"), randn(4, 2, 2, 1, 1, 3, 3, seed="t")

    def of(mask: Tensor, tmask: Tensor) -> Any:
        return tangent(ours, q, q.sin(), mask, tmask)

    found = vmap(vmap(of), (None, 0))(masks, tmasks)
    each = [tree_map(lambda *y: torch.stack(y), *map(of, masks, t)) for t in tmasks]
    assert_close(named(found), named(tree_map(lambda *y: torch.stack(y), *each)))


# ----------------------------------------------------------------------------
# Cost


@over_broadcasts
def test_each_primitive_is_called_once(batch: Shape, of_mask: Shape) -> None:
    data = random_data(batch, (*of_mask, 1))
    with OperatorCalls() as calls:
        outputs_and_gradients(ours, data)
    assert calls.names == ["forward_jvp", "jvp_backward"]


def test_vmap_over_queries_of_a_shared_mask_calls_a_primitive_once() -> None:
    data = random_data((2, 3), (2, 1, 1))
    q, mask = randn(4, 2, 3, HEADS, 3, 4, seed="q"), data["attn_mask"][..., :3, :3]
    with OperatorCalls() as calls:
        vmap(lambda q: ours(q, q, q, mask))(q)
    assert calls.names == ["forward"]


@over_kinds
@pytest.mark.parametrize("backend", ["cpu", "tiled"])
@pytest.mark.parametrize(("batch", "of_mask"), [((4, 8), (4, 1)), ((8, 4), (1, 4))], ids=str)
def test_the_mask_is_not_expanded_in_memory(
    batch: Shape, of_mask: Shape, backend: str, kind: str
) -> None:
    seqlen = 128
    data = {x: randn(*batch, 1, seqlen, 4, seed=x) for x in ("q", "k", "v", "tq", "tk", "tv")}
    mask = randn(*of_mask, 1, seqlen, seqlen, seed="mask")
    data["attn_mask"] = mask = mask if kind == "additive" else mask > 0
    with jvp_attn.backend(backend), small_tiles(scores=2**12, rows=4):
        _, largest = peak_and_largest_allocation(lambda: outputs_and_gradients(ours, data))
    assert largest < 3 * mask.nbytes  # the expanded mask has 8 times as many


@over_kinds
@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_a_mask_that_the_caller_expanded_is_not_copied(backend: str, kind: str) -> None:
    seqlen = 128
    q = randn(4, 8, 1, seqlen, 4, seed="q")
    mask = randn(4, 1, 1, seqlen, seqlen, seed="mask")
    expanded = (mask if kind == "additive" else mask > 0).expand(4, 8, 1, seqlen, seqlen)

    def tangent_of_q() -> Any:
        return jvp(lambda q: ours(q, q, q, expanded), (q,), (q,))

    with jvp_attn.backend(backend), small_tiles(scores=2**12, rows=4):
        _, largest = peak_and_largest_allocation(tangent_of_q)
    assert largest < mask.nbytes


def test_each_element_of_an_expanded_mask_has_its_own_gradient_and_tangent() -> None:
    data = random_data((2, 3), (2, 1, 1))
    full = (2, 3, 1, SEQLEN_Q, SEQLEN_K)
    q, k, v = data["q"], data["k"], data["v"]
    expanded = data["attn_mask"].expand(full).requires_grad_()

    def gradient(attention: Attention) -> Tensor:
        return torch.autograd.grad(energy(attention(q, k, v, expanded)), expanded)[0]

    assert_close({"grad": gradient(ours)}, {"grad": gradient(with_expanded_mask)})


# ----------------------------------------------------------------------------
# Layout, compiler, fake tensors


@over_broadcasts
@pytest.mark.parametrize("rows_first", [False, True], ids=["heads first", "rows first"])
def test_the_layout_of_the_output_is_that_with_an_expanded_mask(
    rows_first: bool, batch: Shape, of_mask: Shape
) -> None:
    data = random_data(batch, (*of_mask, 1))
    q, k, v, mask = (data[x] for x in ("q", "k", "v", "attn_mask"))
    if rows_first:
        q = q.transpose(-3, -2).contiguous().transpose(-3, -2)
    full = mask.expand(*batch, -1, -1, -1).contiguous()
    (expected,) = ours(q, k, v, full)
    (out,), (out_tangent,) = jvp(lambda q: ours(q, k, v, mask), (q,), (q.sin(),))
    assert out.stride() == out_tangent.stride() == expected.stride()


@over_some
@pytest.mark.parametrize("backend", ["automatic"])
def test_meta_tensors_give_the_same_shapes_and_strides(
    backend: str, batch: Shape, of_mask: Shape
) -> None:
    data = random_data(batch, (*of_mask, 1))

    def total(outputs: Named) -> Tensor:
        return torch.stack([x.sum() for x in outputs.values()]).sum()

    with jvp_attn.backend(backend):
        real, meta = (
            outputs_and_gradients(ours, {x: y.to(device) for x, y in data.items()}, through=total)
            for device in ("cpu", "meta")
        )
    assert {x: y.shape for x, y in meta.items()} == {x: y.shape for x, y in real.items()}
    for name in ("out", "out_tangent"):
        assert meta[name].stride() == real[name].stride()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@over_some
def test_compiled_attention_equals_eager(batch: Shape, of_mask: Shape, dynamic: bool) -> None:
    data = random_data(batch, (*of_mask, 1))
    names = ("q", "k", "v", "attn_mask")

    def tangent_of(*x: Tensor) -> Any:
        return jvp(ours, x[:4], x[4:])

    compiled = torch.compile(tangent_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for f in (compiled, tangent_of):
        leaves = [data[t + x].detach().requires_grad_() for t in ("", "t") for x in names]
        (out,), (out_tangent,) = f(*leaves)
        results.append(named(torch.autograd.grad(energy((out, out_tangent)), leaves)))
    assert_close(*results)
