"""Head dims above 256, which no kernel serves: `tiled` computes them, exactly and in tiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import (
    AttentionOptions,
    FlashAttention,
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    scaled_dot_product_attention,
)
from jvp_attn.backends.select import resolve_backend
from tests.jvp_attn import test_func_transforms as transforms
from tests.jvp_attn.attention_cases import (
    Case,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    peak_and_largest_allocation,
    projection,
    randn,
    relative_error,
    small_tiles,
    with_tangents,
)
from tests.jvp_attn.packed_cases import PackedCase

WIDE_QK = Case(seqlen_q=3, seqlen_k=4, head_dim=257, head_dim_v=2)
WIDE_V = Case(seqlen_q=3, seqlen_k=4, head_dim=2, head_dim_v=300)
WIDE = Case(seqlen_q=3, seqlen_k=4, head_dim=512, head_dim_v=512)
CASES = {
    "q and k": WIDE_QK,
    "v": WIDE_V,
    "q, k and v": WIDE,
    "one head": replace(WIDE, heads=1, heads_k=1),
    "causal": replace(WIDE, causal=True),
    "boolean mask": replace(WIDE_QK, mask="boolean"),
    "additive mask with a tangent": replace(WIDE_V, mask="additive", with_tangent="qkvm"),
    "scaled_dot_product_attention": replace(WIDE, torchs_interface=True, causal=True),
    "packed": PackedCase((3, 0, 2), (4, 1, 2), head_dim=300, head_dim_v=257, causal=True),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
CHOSEN = ["automatic", "tiled"]


@pytest.mark.parametrize("backend", CHOSEN)
@over_cases
def test_gradients_through_out_and_tangent_are_exact(case: Case | PackedCase, backend: str) -> None:
    expected = outputs_and_gradients(case.naive, case.data())
    with jvp_attn.backend(backend), small_tiles(scores=1000, rows=2):
        assert_close(outputs_and_gradients(case.ours, case.data()), expected)


@pytest.mark.parametrize("case", [WIDE_QK, WIDE_V], ids=["q and k", "v"])
@pytest.mark.parametrize(
    "derivative",
    [
        transforms.vjp_of_jvp,
        transforms.jvp_of_grad,
        transforms.grad_of_grad,
        transforms.vmap_of_grad_of_jvp,
        transforms.vmap_of_jvp_of_grad,
    ],
    ids=lambda derivative: derivative.__name__,
)
def test_second_derivatives_are_exact(derivative: transforms.Derivative, case: Case) -> None:
    x, t = case.point_and_direction()
    ours = derivative(case.ours, x, t)
    assert_close(named(ours), named(derivative(case.naive, x, t)))


def test_padded_keys_are_not_seen() -> None:
    data = WIDE.data()
    used = torch.tensor([2, 4], dtype=torch.int32)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_jvp(q, k, v, seqused_k=used, return_lse=True)

    with jvp_attn.backend("math"):
        expected = outputs_and_gradients(attention, data)
    assert_close(outputs_and_gradients(attention, data), expected)


def test_tangents_may_be_passed_by_hand() -> None:
    xt = tuple(WIDE.data().values())

    def loss(*xt: Tensor) -> Tensor:
        return energy(flash_attn_with_tangent(*xt, return_lse=True))

    ours = torch.func.grad(loss, tuple(range(6)))(*xt)
    with jvp_attn.backend("math"):
        assert_close(named(ours), named(torch.func.grad(loss, tuple(range(6)))(*xt)))


def test_torchs_attention_has_the_same_output_tangent_and_gradients() -> None:
    through = projection("out", "out_tangent")
    ours = outputs_and_gradients(WIDE.ours, WIDE.data(), through=through)
    torchs = outputs_and_gradients(WIDE.torch_math, WIDE.data(), through=through)
    assert_close({name: ours[name] for name in torchs}, torchs)


@pytest.mark.parametrize("case", [WIDE_QK, WIDE_V, WIDE], ids=["q and k", "v", "q, k and v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_as_accurate_as_torchs(dtype: torch.dtype, case: Case) -> None:
    """The error is at most twice that of torch in the same precision, plus one rounding."""
    through = projection("out", "out_tangent", dtype=dtype)
    data = {name: x.to(dtype) for name, x in case.data().items()}
    exact = outputs_and_gradients(
        case.torch_math, {name: x.double() for name, x in data.items()}, through=through
    )
    ours = outputs_and_gradients(case.ours, data, through=through)
    torchs = outputs_and_gradients(case.torch_math, data, through=through)
    for name, x in exact.items():
        allowed = 2 * relative_error(torchs[name], x) + torch.finfo(dtype).eps
        assert relative_error(ours[name], x) <= allowed, name


# ----------------------------------------------------------------------------
# Which backend


def test_the_automatic_choice_is_tiled() -> None:
    for case in (WIDE_QK, WIDE_V, WIDE):
        assert resolve_backend(*case.primals().values()) == "tiled"
    widest_of_a_kernel = replace(WIDE, head_dim=256, head_dim_v=256).primals().values()
    if "cpu" in jvp_attn.available_backends():
        assert resolve_backend(*widest_of_a_kernel) == "cpu"


TOO_WIDE = re.escape(
    "backend 'cpu' cannot compute this: head_dim 512 is above 256, the kernels' largest; 'tiled'"
)


def as_torch_does(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)


def in_one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = (torch.tensor([0, len(x[0])], dtype=torch.int32) for x in (q, k))
    return flash_attn_varlen_jvp(q[0], k[0], v[0], *ends, q.shape[1], k.shape[1])


def by_its_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return FlashAttention.apply(q, k, v, *4 * (None,), AttentionOptions(1.0, backend="cpu"))


@pytest.mark.skipif(
    "cpu" not in jvp_attn.available_backends(), reason="the CPU extension is not built"
)
@pytest.mark.parametrize(
    "attention",
    [flash_attn_jvp, flash_attn_with_tangent, as_torch_does, in_one_sequence, by_its_function],
    ids=lambda attention: attention.__name__,
)
def test_a_backend_of_kernels_says_that_the_heads_are_too_wide(
    attention: Callable[..., object],
) -> None:
    with jvp_attn.backend("cpu"), pytest.raises(ValueError, match=TOO_WIDE):
        attention(*WIDE.primals().values())


def test_a_layer_with_one_wide_head_works_in_replace_sdpa() -> None:
    """The attention of a VAE: one head with all 512 channels."""
    layer = torch.nn.MultiheadAttention(512, 1, batch_first=True).double()
    x, tx = (randn(2, 6, 512, seed=seed) for seed in ("x", "tx"))

    def attention(x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=False)[0]

    with jvp_attn.replace_sdpa():
        ours = torch.func.jvp(attention, (x,), (tx,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(named(ours), named(torch.func.jvp(attention, (x,), (tx,))))


# ----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 1, 2, 4, 4, head_dim=512, head_dim_v=1),
        Case(64, 2, 1, 4, 4, head_dim=512, head_dim_v=1),
        Case(1, 512, 1, 4, 1, head_dim=512, head_dim_v=1),
        Case(64, 1, 2, 4, 4, head_dim=1, head_dim_v=256),
    ],
    ids=["one query", "one key", "many queries", "v"],
)
def test_tiles_of_wide_heads_stay_small(case: Case) -> None:
    """However short the sequences: no tile is larger than its budget, or than the outputs."""
    data = case.data()
    budget = 2**15
    with small_tiles(scores=budget, rows=1), jvp_attn.backend("tiled"):
        _, largest = peak_and_largest_allocation(lambda: with_tangents(case.ours, data))
    of_out = case.batch * case.seqlen_q * case.heads * case.head_dim_v
    assert largest <= 8 * max(budget, of_out)
