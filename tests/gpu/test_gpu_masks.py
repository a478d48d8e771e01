"""Masks and packed sequences in half precision against float64, outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.machines import (
    Machine,
    assert_at_most_twice_the_error,
    outputs,
    outputs_and_gradients,
)
from tests.gpu.test_gpu_accuracy import over_dtypes, over_masks
from tests.jvp_attn.attention_cases import Attention, Case, randn
from tests.jvp_attn.data_kinds import in_dtype
from tests.jvp_attn.packed_cases import PackedCase

over_head_dims = pytest.mark.parametrize("head_dim", [64, 80, 128])


def assert_accurate(machine: Machine, case: Case | PackedCase) -> None:
    """Each error is at most twice that of the naive formula in float32, or one rounding."""
    data = {name: x.to(machine.device) for name, x in case.data().items()}
    mask = None if "tattn_mask" in data else data.pop("attn_mask", None)
    cotangents = {
        name: randn(*x.shape, seed=f"cotangent of {name}", dtype=x.dtype).to(machine.device)
        for name, x in outputs(beside(mask, case.ours), data).items()
    }

    def evaluate(attention: Attention, dtype: torch.dtype) -> dict[str, Tensor]:
        constant = None if mask is None else in_dtype({"mask": mask}, dtype)["mask"]
        return outputs_and_gradients(
            beside(constant, attention), in_dtype(data, dtype), in_dtype(cotangents, dtype)
        )

    ours = outputs_and_gradients(beside(mask, case.ours), data, cotangents)
    torchs, exact = (evaluate(case.naive, dtype) for dtype in (torch.float32, torch.float64))
    assert_at_most_twice_the_error(ours, torchs, exact, case.dtype)


def beside(mask: Tensor | None, attention: Attention) -> Attention:
    """With that mask, which is constant."""
    return attention if mask is None else lambda q, k, v: attention(q, k, v, mask)


@over_dtypes
@over_masks
@over_head_dims
@pytest.mark.parametrize("dims", ["bhqk", "b..k", "h.k", "qk", "hq."])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masked(
    machine: Machine, kind: str, dims: str, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    case = Case(
        *(2, machine.scaled(1500), machine.scaled(1700), 4, 2, head_dim, head_dim),
        causal=causal,
        mask=kind,
        mask_dims=dims,
        dtype=dtype,
    )
    assert_accurate(machine, case)


@over_dtypes
@pytest.mark.parametrize("dims", ["bhqk", "h.k"])
def test_derivatives_of_a_mask(machine: Machine, dims: str, dtype: torch.dtype) -> None:
    shape = (2, machine.scaled(1000), machine.scaled(1100), 4, 2, 64, 64)
    case = Case(*shape, mask="additive", mask_dims=dims, with_tangent="qkvm", dtype=dtype)
    assert_accurate(machine, case)


@over_dtypes
@over_masks
@over_head_dims
def test_packed(machine: Machine, head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    lengths_q, lengths_k = ((1000, 0, 700, 1, 64), (900, 300, 0, 130, 64))
    scaled = (tuple(x and machine.scaled(x) for x in xs) for xs in (lengths_q, lengths_k))
    case = PackedCase(*scaled, beyond=3, head_dim=head_dim, head_dim_v=head_dim, causal=causal)
    assert_accurate(machine, replace(case, dtype=dtype))
