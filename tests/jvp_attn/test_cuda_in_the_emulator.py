"""What only the CUDA backend does, its kernels in the emulator: residuals, and two-step maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from attention_cases import (
    Attention,
    Case,
    Named,
    assert_close,
    named,
    outputs_and_gradients,
    part,
    projection,
    relative_error,
    with_tangents,
    without_tangents,
)
from emulated_backend import emulated_backend
from test_attention_precision import in_dtype, offset, over_data
from torch import Tensor

from jvp_attn import AttentionOptions, FlashAttention, FlashAttentionTangent

BF16 = torch.bfloat16
Evaluate = Callable[[Attention, Named], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def kernels_run_in_the_emulator() -> Iterator[None]:
    with emulated_backend():
        yield


def ours_and_exact(case: Case, data: Named, evaluate: Evaluate = with_tangents) -> list[Named]:
    """All outputs and the gradients through them."""
    return [
        outputs_and_gradients(f, x, evaluate=evaluate, through=projection(dtype=BF16))
        for f, x in ((case.ours, data), (case.naive, in_dtype(data, torch.float64)))
    ]


def assert_exact_to_two_roundings(ours: Named, exact: Named) -> None:
    """The kernels round P and the like to the dtype once, and the results once more."""
    errors = {name: relative_error(x, exact[name]) for name, x in ours.items()}
    assert all(error <= torch.finfo(BF16).eps for error in errors.values()), errors


@over_data
def test_gradients_through_all_outputs(kind: Callable[[Named], Named]) -> None:
    case = Case(2, 33, 80, heads=4, heads_k=1, head_dim=40, head_dim_v=24)
    data = in_dtype(kind(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))


@over_data
def test_gradients_without_tangents(kind: Callable[[Named], Named]) -> None:
    case = Case(1, 70, 80, heads=2, heads_k=1, head_dim=64, head_dim_v=64, causal=True)
    data = in_dtype(part(kind(case.data()), ("q", "k", "v")), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data, without_tangents))


@pytest.mark.parametrize("evaluate", [with_tangents, without_tangents])
def test_the_means_of_q_and_k_stay_out_of_the_gradients(evaluate: Evaluate) -> None:
    """Without residuals these gradients are wrong by a fifth and more."""
    case = Case(1, 64, 128, heads=1, heads_k=1, head_dim=64, head_dim_v=64)
    data = offset(case.data())
    data = in_dtype({**data, "q": data["q"] + 5}, BF16)
    if evaluate is without_tangents:
        data = part(data, ("q", "k", "v"))
    assert_exact_to_two_roundings(*ours_and_exact(case, data, evaluate))


def test_at_head_dim_256_a_tangent_takes_two_kernels_and_its_gradient_is_blockwise() -> None:
    case = Case(1, 20, 40, heads=2, heads_k=1, head_dim=160, head_dim_v=256)
    data = in_dtype(offset(case.data()), BF16)
    assert_exact_to_two_roundings(*ours_and_exact(case, data))


@pytest.mark.parametrize("head_dim", [8, 160])
def test_without_grad_the_same_comes_out(head_dim: int) -> None:
    case = Case(head_dim=head_dim, head_dim_v=8, dtype=BF16)
    data = case.data()
    with torch.no_grad():
        without = with_tangents(case.ours, data)
    assert_close(without, with_tangents(case.ours, data), tolerance=0)


def test_missing_residuals_do_not_change_a_gradient() -> None:
    case = Case(1, 20, 30, head_dim=64, head_dim_v=64)
    x = [y.to(BF16).requires_grad_() for y in offset(case.data()).values()]

    def gradients(residuals: bool) -> tuple[Tensor, ...]:
        options = AttentionOptions(0.125, backend="emulated", residuals=residuals)
        out, *_, out_residual = FlashAttention.apply(*x[:3], options)
        _, _, tout, *_, tout_residual = FlashAttentionTangent.apply(*x, options)
        assert (out_residual is None) == (tout_residual is None) == (not residuals)
        loss = projection(dtype=BF16)
        return (
            *torch.autograd.grad(loss({"out": out}), x[:3]),
            *torch.autograd.grad(loss({"tout": tout}), x),
        )

    assert_close(named(gradients(False)), named(gradients(True)), tolerance=0)
