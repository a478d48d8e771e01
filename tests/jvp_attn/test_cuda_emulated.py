"""The CUDA backend, its kernels run by the emulator, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import AttentionOptions, FlashAttention, FlashAttentionJvp
from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.attention_cases import (
    Attention,
    Case,
    Named,
    assert_close,
    assert_exact_to_two_roundings,
    named,
    outputs_and_gradients,
    part,
    projection,
    with_tangents,
    without_tangents,
)
from tests.jvp_attn.data_kinds import Kind, in_dtype, offset, over_data
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.packed_cases import PackedCase

BF16 = torch.bfloat16
Evaluate = Callable[[Attention, Named], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def kernels_run_in_the_emulator() -> Iterator[None]:
    with emulated_backend():
        yield


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if the backend computes a primitive without kernels."""
    monkeypatch.setattr(CudaBackend, "_fallback", None)


def ours_and_exact(
    case: Case | PackedCase, data: Named, evaluate: Evaluate = with_tangents
) -> list[Named]:
    """All outputs and the gradients through them."""
    return [
        outputs_and_gradients(f, x, evaluate=evaluate, through=projection(dtype=BF16))
        for f, x in ((case.ours, data), (case.naive, in_dtype(data, torch.float64)))
    ]


@pytest.mark.usefixtures("only_kernels")
@over_data
def test_gradients_through_all_outputs_are_exact_to_two_roundings(kind: Kind) -> None:
    case = Case(2, 33, 80, heads=4, heads_k=1, head_dim=40, head_dim_v=24)
    data = in_dtype(kind(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))


@pytest.mark.usefixtures("only_kernels")
@over_data
def test_gradients_without_tangents_are_exact_to_two_roundings(kind: Kind) -> None:
    case = Case(1, 70, 80, heads=2, heads_k=1, head_dim=64, head_dim_v=64, causal=True)
    data = in_dtype(part(kind(case.data()), ("q", "k", "v")), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data, without_tangents))


@pytest.mark.usefixtures("only_kernels")
def test_causal_aligned_at_the_top_left() -> None:
    case = Case(1, 40, 70, 2, 1, head_dim=32, head_dim_v=32, causal=True, torchs_interface=True)
    assert_exact_to_two_roundings(*ours_and_exact(case, in_dtype(case.data(), BF16)))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("evaluate", [with_tangents, without_tangents])
def test_large_means_of_q_and_k_do_not_degrade_the_gradients(evaluate: Evaluate) -> None:
    """Without low-order parts the error of these gradients is a fifth and more."""
    case = Case(1, 64, 128, heads=1, heads_k=1, head_dim=64, head_dim_v=64)
    data = offset(case.data())
    data = in_dtype({**data, "q": data["q"] + 5}, BF16)
    if evaluate is without_tangents:
        data = part(data, ("q", "k", "v"))
    assert_exact_to_two_roundings(*ours_and_exact(case, data, evaluate))


def test_at_head_dim_256_the_jvp_takes_two_kernels_and_its_backward_is_tiled() -> None:
    case = Case(1, 20, 40, heads=2, heads_k=1, head_dim=160, head_dim_v=256)
    data = in_dtype(offset(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))


# ----------------------------------------------------------------------------
# Masks

PLAIN = Case(2, 33, 70, heads=4, heads_k=2, head_dim=48, head_dim_v=64)
MASKED = {
    "boolean": replace(PLAIN, mask="boolean"),
    "boolean, one for all heads": replace(PLAIN, mask="boolean", mask_dims="b.qk"),
    "boolean, padding": replace(PLAIN, mask="boolean", mask_dims="b..k"),
    "boolean, causal": replace(PLAIN, mask="boolean", mask_dims="hqk", causal=True),
    "additive": replace(PLAIN, mask="additive"),
    "additive, the same for all keys": replace(PLAIN, mask="additive", mask_dims="hq."),
    "additive, causal": replace(PLAIN, mask="additive", mask_dims="qk", causal=True),
    "additive, head dim 128": replace(
        PLAIN, mask="additive", mask_dims="h.k", head_dim=100, head_dim_v=128
    ),
}


def with_constant_mask(mask: Tensor, evaluate: Evaluate = with_tangents) -> Evaluate:
    """With a mask that is constant: derivatives of a mask have no kernels."""

    def evaluated(attention: Attention, data: Named) -> dict[str, Tensor]:
        exactly = data["q"].dtype == torch.float64 and mask.is_floating_point()
        return evaluate(attention, {**data, "attn_mask": mask.double() if exactly else mask})

    return evaluated


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED.keys())
def test_gradients_with_a_constant_mask(case: Case) -> None:
    data = in_dtype(offset(case.data()), BF16)
    mask = data.pop("attn_mask")
    assert_exact_to_two_roundings(*ours_and_exact(case, data, with_constant_mask(mask)))
    of_qkv = part(data, ("q", "k", "v"))
    assert_exact_to_two_roundings(
        *ours_and_exact(case, of_qkv, with_constant_mask(mask, without_tangents))
    )


@pytest.mark.usefixtures("only_kernels")
def test_a_mask_may_be_more_precise_than_the_inputs() -> None:
    case = MASKED["additive"]
    data = case.data()
    mask = data.pop("attn_mask").float()
    assert_exact_to_two_roundings(
        *ours_and_exact(case, in_dtype(data, BF16), with_constant_mask(mask))
    )


@pytest.mark.usefixtures("only_kernels")
def test_at_head_dim_256_the_jvp_with_a_mask_takes_two_kernels() -> None:
    case = replace(PLAIN, mask="boolean", head_dim=256, head_dim_v=160)
    data = in_dtype(offset(case.data()), BF16)
    exact = with_tangents(case.naive, in_dtype(data, torch.float64))
    assert_exact_to_two_roundings(with_tangents(case.ours, data), exact)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize(
    ("batch", "of_mask"), [((2, 3), (2, 1)), ((2, 3), (1, 3)), ((2, 3, 2), (1, 3, 1))], ids=str
)
def test_a_constant_mask_that_examples_share(
    batch: tuple[int, ...], of_mask: tuple[int, ...], kind: str
) -> None:
    case = replace(PLAIN, batch=math.prod(batch), mask=kind, heads=2, heads_k=2)
    data = in_dtype(case.data(), BF16)
    mask = data.pop("attn_mask")[: math.prod(of_mask)].unflatten(0, of_mask)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor]:
        heads_first = (x.transpose(1, 2).unflatten(0, batch) for x in (q, k, v))
        out = jvp_attn.scaled_dot_product_attention(*heads_first, attn_mask)
        return (out.flatten(0, -4).transpose(1, 2),)

    def naive(*x: Tensor) -> tuple[Tensor]:
        with jvp_attn.backend("math"):
            return attention(*x)

    for evaluate in (with_tangents, without_tangents):
        found, exact = (
            outputs_and_gradients(
                f,
                part(x, x.keys() if evaluate is with_tangents else ("q", "k", "v")),
                evaluate=with_constant_mask(mask, evaluate),
                through=projection(dtype=BF16),
            )
            for f, x in ((attention, data), (naive, in_dtype(data, torch.float64)))
        )
        assert_exact_to_two_roundings(found, exact)


@pytest.mark.parametrize("dims", ["bhqk", "h.k"])
def test_a_mask_with_tangent_and_gradient_agrees_with_the_kernels(dims: str) -> None:
    case = replace(PLAIN, mask="additive", mask_dims=dims, with_tangent="qkvm")
    data = in_dtype(offset(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))
    primals = part(data, ("q", "k", "v", "attn_mask"))
    assert_exact_to_two_roundings(*ours_and_exact(case, primals, without_tangents))


# ----------------------------------------------------------------------------
# Packed sequences

SEQUENCES = PackedCase(
    (70, 0, 33, 5), (80, 10, 0, 20), beyond=3, head_dim=48, head_dim_v=64, causal=True
)
PACKED = {
    "causal": SEQUENCES,
    "full": replace(SEQUENCES, causal=False),
    "head dim 96": replace(SEQUENCES, heads=2, heads_k=2, head_dim=96, head_dim_v=72),
    "head dim 128": replace(SEQUENCES, heads=2, heads_k=1, head_dim=128, head_dim_v=100),
    "all are short": replace(SEQUENCES, seqlens_q=8 * (3,), seqlens_k=8 * (2,)),
}


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED.keys())
def test_gradients_of_packed_sequences(case: PackedCase) -> None:
    data = in_dtype(offset(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))
    primals = part(data, ("q", "k", "v"))
    assert_exact_to_two_roundings(*ours_and_exact(case, primals, without_tangents))


def test_packed_sequences_of_head_dim_256() -> None:
    case = replace(SEQUENCES, head_dim=256, head_dim_v=200)
    data = in_dtype(offset(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))


# ----------------------------------------------------------------------------
# Low-order parts


@pytest.mark.parametrize(
    "case",
    [
        Case(head_dim=8, head_dim_v=8),
        Case(head_dim=160, head_dim_v=8),
        Case(head_dim=8, head_dim_v=8, mask="boolean"),
        PackedCase(head_dim=8, head_dim_v=8, beyond=1),
    ],
    ids=["one kernel", "two kernels", "masked", "packed"],
)
def test_results_without_grad_are_the_same(case: Case | PackedCase) -> None:
    data = in_dtype(case.data(), BF16)
    with torch.no_grad():
        without = with_tangents(case.ours, data)
    assert_close(without, with_tangents(case.ours, data), tolerance=0)


def test_missing_low_order_parts_do_not_change_a_gradient() -> None:
    case = Case(1, 20, 30, head_dim=64, head_dim_v=64)
    q, k, v, tq, tk, tv = (y.to(BF16).requires_grad_() for y in offset(case.data()).values())
    inputs, tangents = (q, k, v, None, None, None, None), (tq, tk, tv, None)

    def gradients(return_lo: bool) -> tuple[Tensor, ...]:
        options = AttentionOptions(0.125, backend="emulated", return_lo=return_lo)
        out, *_, lse_lo = FlashAttention.apply(*inputs, options)
        _, _, tout, *_, tout_lo, _ = FlashAttentionJvp.apply(*inputs, *tangents, options)
        assert (lse_lo is None) == (tout_lo is None) == (not return_lo)
        loss = projection(dtype=BF16)
        return (
            *torch.autograd.grad(loss({"out": out}), (q, k, v)),
            *torch.autograd.grad(loss({"tout": tout}), (q, k, v, tq, tk, tv)),
        )

    assert_close(named(gradients(False)), named(gradients(True)), tolerance=0)
