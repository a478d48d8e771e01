"""Masks of every kind and broadcast shape: their effect and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

import jvp_attn
from jvp_attn import flash_attn_with_tangent
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
    relative_error,
    small_tiles,
    with_tangents,
)

# Dimensions as `Case.mask_dims` names them.
BROADCASTS = (
    "",
    "k",
    "q.",
    "qk",
    ".qk",
    "h..",
    "hqk",
    "b..k",
    "b.q.",
    ".h.k",
    ".hqk",
    "bh..",
    "bhqk",
)
over_broadcasts = pytest.mark.parametrize("dims", BROADCASTS, ids=lambda dims: dims or "scalar")
over_kinds = pytest.mark.parametrize("kind", ["boolean", "additive"])
over_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
over_backends = pytest.mark.parametrize("backend", BACKENDS)

CASE = Case(batch=2, seqlen_q=9, seqlen_k=11, heads=4, heads_k=2)
# Tiles of two rows and two query heads: masks are sliced along rows, heads and batches.
SMALL_TILES = {"scores": 40, "rows": 4}


def masked(kind: str, dims: str, causal: bool = False) -> Case:
    """Every floating point input has a tangent."""
    letters = "qkvm" if kind == "additive" else "qkv"
    return replace(CASE, mask=kind, mask_dims=dims, causal=causal, with_tangent=letters)


@over_causal
@over_broadcasts
@over_kinds
def test_outputs_tangents_and_gradients_equal_the_naive_formula(
    kind: str, dims: str, causal: bool
) -> None:
    case = masked(kind, dims, causal)
    data = case.data()
    with small_tiles(**SMALL_TILES):
        ours = outputs_and_gradients(case.ours, data)
    assert_close(ours, outputs_and_gradients(case.naive, data))


@over_causal
@over_broadcasts
@over_kinds
@over_backends
def test_out_its_tangent_and_gradients_through_both_equal_torch(
    backend: str, kind: str, dims: str, causal: bool
) -> None:
    case = masked(kind, dims, causal)
    data = case.data()
    through = projection("out", "out_tangent")
    with jvp_attn.backend(backend), small_tiles(**SMALL_TILES):
        ours = outputs_and_gradients(case.ours, data, through=through)
    torchs = outputs_and_gradients(case.torch_math, data, through=through)
    # The gradient of a scalar mask is a sum of some thousand terms that cancel.
    assert_close(part(ours, torchs), torchs, tolerance=1e-11)


@pytest.mark.parametrize("letters", ["m", "qm", "km", "vm", "kvm", "qkv"])
def test_any_subset_of_tangents_works_with_a_mask(letters: str) -> None:
    case = replace(masked("additive", ".hqk"), with_tangent=letters)
    data = case.data()
    with small_tiles(**SMALL_TILES):
        ours = outputs_and_gradients(case.ours, data)
    assert_close(ours, outputs_and_gradients(case.naive, data))


# ----------------------------------------------------------------------------
# The effect of a mask


def test_a_boolean_mask_equals_an_additive_one_of_zero_and_minus_infinity() -> None:
    case = masked("boolean", "b.qk")
    data = case.data()
    bias = torch.zeros(case.mask_shape(), dtype=case.dtype)
    bias = bias.masked_fill(~data["attn_mask"], -torch.inf)
    assert_close(
        with_tangents(case.ours, data), with_tangents(case.ours, {**data, "attn_mask": bias})
    )


def test_causal_equals_a_triangular_mask() -> None:
    case = replace(CASE, causal=True)
    data = case.data()
    visible = torch.ones(9, 11, dtype=torch.bool).tril(11 - 9)
    full = replace(case, causal=False)
    assert_close(
        outputs_and_gradients(case.ours, data),
        outputs_and_gradients(full.ours, {**data, "attn_mask": visible}),
    )


def test_masking_padding_equals_cutting_it_off() -> None:
    padded = CASE.data()
    cut = {name: x if name in ("q", "tq") else x[:, :6] for name, x in padded.items()}
    ours = outputs_and_gradients(CASE.ours, {**padded, "attn_mask": torch.arange(11) < 6})
    expected = outputs_and_gradients(CASE.ours, cut)
    for name in ("k", "v", "tk", "tv"):
        gradient = ours[f"grad_{name}"]
        assert (gradient[:, 6:] == 0).all(), name
        ours[f"grad_{name}"] = gradient[:, :6]
    assert_close(ours, expected)


def test_a_mask_that_is_constant_along_a_row_shifts_only_lse_and_mu() -> None:
    case = replace(CASE, causal=True)
    x = case.data()
    bias, tbias = (randn(2, 4, 9, 1, seed=seed) for seed in ("bias", "its tangent"))
    plain = with_tangents(case.ours, x)
    shifted = with_tangents(case.ours, {**x, "attn_mask": bias, "tattn_mask": tbias})
    plain["lse"] = plain["lse"] + bias.squeeze(-1)
    plain["mu"] = plain["mu"] + tbias.squeeze(-1)
    assert_close(shifted, plain)


def test_the_gradient_of_a_mask_through_out_sums_to_zero_along_a_row_and_through_lse_to_one() -> (
    None
):
    case = masked("additive", "bhqk")
    q, k, v, mask = case.primals().values()

    def gradient(index: int, cotangent: Tensor) -> Tensor:
        return grad(lambda m: (case.ours(q, k, v, m)[index] * cotangent).sum())(mask)

    alive = ~case.ours(q, k, v, mask)[1].isneginf()
    through_out = gradient(0, randn(2, 9, 4, 6, seed="cotangent")).sum(-1)
    through_lse = gradient(1, torch.where(alive, 1.0, 0.0)).sum(-1)
    assert_close(
        {"out": through_out, "lse": through_lse},
        {"out": torch.zeros(2, 4, 9).double(), "lse": alive.double()},
    )


# ----------------------------------------------------------------------------
# Fully masked rows


@over_backends
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("dims", ["q.", "qk", "bhqk"])
@over_kinds
def test_fully_masked_rows_have_out_zero_lse_minus_infinity_and_no_derivative(
    kind: str, dims: str, dtype: torch.dtype, backend: str
) -> None:
    case = replace(masked(kind, dims), dtype=dtype)
    with jvp_attn.backend(backend), small_tiles(**SMALL_TILES):
        found = outputs_and_gradients(case.ours, case.data())
    assert (found["lse"][:, :, 1] == -torch.inf).all()
    for name in ("out", "out_tangent", "grad_q", "grad_tq"):
        assert (found[name][:, 1] == 0).all(), name
        assert (found[name] != 0).any(), name
    assert (found["mu"][:, :, 1] == 0).all()
    for name, x in found.items():
        assert not x.isnan().any() and not x.isposinf().any(), name
    for name in found.keys() & {"grad_attn_mask", "grad_tattn_mask"}:
        assert (found[name][..., 1, :] == 0).all(), name


@over_backends
@over_kinds
def test_a_mask_may_mask_every_key(kind: str, backend: str) -> None:
    case = masked(kind, "k")
    data = case.data()
    nothing_visible = torch.full((11,), False if kind == "boolean" else -torch.inf)
    data["attn_mask"] = nothing_visible.to(data["attn_mask"].dtype)
    with jvp_attn.backend(backend):
        found = outputs_and_gradients(case.ours, data)
    assert (found.pop("lse") == -torch.inf).all()
    assert all((x == 0).all() for x in found.values())


@over_kinds
def test_causal_and_a_mask_together_may_mask_a_row_fully(kind: str) -> None:
    case = replace(CASE, seqlen_q=4, seqlen_k=4, causal=True)
    data = case.data()
    visible = torch.ones(4, 4, dtype=torch.bool).triu(1)
    visible[3] = True
    bias = torch.zeros(4, 4, dtype=case.dtype).masked_fill(~visible, -torch.inf)
    data["attn_mask"] = visible if kind == "boolean" else bias
    found = outputs_and_gradients(case.ours, data)
    assert (found["lse"][:, :, :3] == -torch.inf).all()
    assert (found["out"][:, :3] == 0).all()
    assert_close(found, outputs_and_gradients(case.naive, data))


# ----------------------------------------------------------------------------
# Second derivatives

over_second_order = pytest.mark.parametrize("dims", ["k", "b.q.", ".hqk", "bhqk"])


def second_derivatives_agree(
    derivative: Callable[[Case, Callable[..., Any]], Any], case: Case
) -> None:
    with small_tiles(**SMALL_TILES):
        ours = derivative(case, case.ours)
    assert_close(named(ours), named(derivative(case, case.naive)), tolerance=1e-11)


@over_second_order
@over_kinds
def test_hessian_vector_products_equal_the_naive_formula(kind: str, dims: str) -> None:
    def product(case: Case, attention: Callable[..., Any]) -> Any:
        data = case.data()
        point, direction = case.point_and_direction()
        fixed = [data["attn_mask"]] if kind == "boolean" else []

        def f(*inputs: Tensor) -> Tensor:
            return energy(x.masked_fill(x == -torch.inf, 0) for x in attention(*inputs, *fixed))

        return jvp(grad(f, argnums=tuple(range(len(point)))), point, direction)

    second_derivatives_agree(product, masked(kind, dims))


@over_second_order
def test_gradients_of_gradient_penalties_equal_the_naive_formula(dims: str) -> None:
    """Reverse over reverse, for every input, the mask among them."""

    def penalty(case: Case, attention: Callable[..., Any]) -> Any:
        leaves = [x.requires_grad_() for x in case.primals().values()]
        out, lse = attention(*leaves)
        value = energy([out, lse.masked_fill(lse == -torch.inf, 0)])
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(0.1 * g.square().sum() for g in gradients), leaves)

    second_derivatives_agree(penalty, masked("additive", dims))


# ----------------------------------------------------------------------------
# The mask as a tensor


@over_broadcasts
def test_the_gradient_of_an_expanded_mask_is_summed_to_its_shape(dims: str) -> None:
    case = masked("additive", dims)
    data = case.data()
    full = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)

    def expanding(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor, ...]:
        return case.ours(q, k, v, attn_mask.expand(full))

    assert_close(outputs_and_gradients(expanding, data), outputs_and_gradients(case.ours, data))


@pytest.mark.parametrize(
    "layout",
    [
        lambda mask: mask.mT.contiguous().mT,
        lambda mask: torch.stack([mask, mask], -1)[..., 0],
        lambda mask: torch.cat([mask, mask], -2)[..., : mask.shape[-2], :],
    ],
    ids=["columns first", "every other number", "half of a longer one"],
)
@over_kinds
def test_the_strides_of_a_mask_change_no_result(
    kind: str, layout: Callable[[Tensor], Tensor]
) -> None:
    case = masked(kind, "bhqk")
    data = case.data()
    laid_out = {name: layout(x) if "mask" in name else x for name, x in data.items()}
    with small_tiles(**SMALL_TILES):
        assert_close(
            outputs_and_gradients(case.ours, laid_out), outputs_and_gradients(case.ours, data)
        )


@over_kinds
def test_a_mask_is_never_modified(kind: str) -> None:
    case = masked(kind, "b.qk", causal=True)
    data = case.data()
    before = data["attn_mask"].clone()
    with small_tiles(**SMALL_TILES):
        outputs_and_gradients(case.ours, data)
    assert torch.equal(data["attn_mask"], before)
    assert data["attn_mask"]._version == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_mask_may_be_float32_for_half_precision_inputs(dtype: torch.dtype) -> None:
    case = masked("additive", "bhqk")
    data = {name: x.to(dtype) for name, x in case.data().items()}
    # The mask is more precise than half precision: rounding it would change the result.
    fine = {name: x.float() for name, x in case.data().items() if "mask" in name}
    through = projection(dtype=dtype)
    found = outputs_and_gradients(case.ours, data | fine, through=through)
    assert {name for name, x in found.items() if x.dtype == torch.float32} == FINE
    exact = outputs_and_gradients(
        case.naive, {name: x.double() for name, x in (data | fine).items()}, through=through
    )
    for name, x in exact.items():
        allowed = 1e-5 if name in FINE else torch.finfo(dtype).eps
        assert relative_error(found[name], x) < allowed, name


FINE = {"lse", "mu", "grad_attn_mask", "grad_tattn_mask"}


def test_vmap_over_masks_only() -> None:
    case = masked("additive", "h.k")
    x = case.data()
    q, k, v, _ = case.primals().values()
    masks, tmasks = randn(2, 3, 4, 1, 11, seed="masks")

    def tangent(mask: Tensor, tmask: Tensor) -> Any:
        return jvp(lambda q, m: case.ours(q, k, v, m), (q, mask), (x["tq"], tmask))

    assert_close(
        named(vmap(tangent)(masks, tmasks)),
        named(tree_map(lambda *x: torch.stack(x), *map(tangent, masks, tmasks))),
    )


def test_flash_attn_with_tangent_takes_the_tangent_of_a_mask() -> None:
    case = masked("additive", "bhqk")
    data = case.data()
    outputs = flash_attn_with_tangent(**data, return_lse=True)
    threaded = dict(zip(("out", "out_tangent", "lse", "mu"), outputs, strict=True))
    assert_close(threaded, with_tangents(case.ours, data))


# ----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
@pytest.mark.parametrize("dims", ["k", "q.", "h.."])
@over_kinds
def test_a_mask_is_not_expanded_in_memory(kind: str, dims: str, backend: str) -> None:
    seqlen = 512
    case = Case(1, seqlen, seqlen, 2, 1, 4, 4, mask=kind, mask_dims=dims, dtype=torch.float32)
    data = case.data()
    with jvp_attn.backend(backend), small_tiles(scores=2**12, rows=4):
        _, largest = peak_and_largest_allocation(lambda: outputs_and_gradients(case.ours, data))
    assert largest < seqlen * seqlen / 4  # bytes; an expanded boolean mask takes one a score
