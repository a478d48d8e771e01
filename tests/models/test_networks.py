"""Whole networks of other libraries have exact derivatives inside `replace_sdpa()`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_attn
from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import (
    assert_close,
    peak_and_largest_allocation,
    randn,
    relative_error,
    small_tiles,
)
from tests.models.networks import NETWORKS, Network, bert_with_empty_text, modern_bert

Build = Callable[..., Network]
Around = Callable[[], AbstractContextManager[Any]]

of_all = pytest.mark.parametrize("build", NETWORKS)
with_masks = pytest.mark.parametrize("build", [*NETWORKS, bert_with_empty_text])


def torch_math() -> AbstractContextManager[Any]:
    """torch's attention in the implementation that has all derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def derivatives(
    network: Network, around: Around, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Output, tangent, and the gradients of a projection of both with respect to weights."""
    inputs = tuple(x.to(dtype) for x in network.inputs)
    tangents = tuple(randn(*x.shape, seed="tangent").to(dtype) for x in inputs)

    def project(weights: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, tangent = jvp(lambda *x: functional_call(network, weights, x), inputs, tangents)
        projection = out * randn(*out.shape, seed="of out") + tangent * randn(
            *out.shape, seed="of tangent"
        )
        return projection.sum(), (out, tangent)

    with around():
        gradients, (out, tangent) = grad(project, has_aux=True)(
            {name: x.detach().to(dtype) for name, x in network.named_parameters()}
        )
    return {"out": out, "tangent": tangent, **gradients}


@cache
def exact_derivatives(build: Build) -> dict[str, Tensor]:
    """The derivatives of torch's attention in float64."""
    return derivatives(build(), torch_math)


@of_all
def test_torchs_fused_attention_refuses_tangents(build: Build) -> None:
    network = build()
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention"):
        jvp(network, network.inputs, network.inputs)


@with_masks
def test_output_tangent_and_gradients_are_torchs(build: Build) -> None:
    actual = derivatives(build(), replace_sdpa)
    assert_close(actual, exact_derivatives(build))
    assert actual["tangent"].count_nonzero() == actual["tangent"].numel()


@with_masks
def test_errors_in_bfloat16_are_at_most_twice_torchs(build: Build) -> None:
    network = build()
    ours, torchs = (
        derivatives(network, around, torch.bfloat16) for around in (replace_sdpa, torch_math)
    )
    eps = torch.finfo(torch.bfloat16).eps
    for name, x in exact_derivatives(build).items():
        bound = max(2 * relative_error(torchs[name], x), eps)
        assert relative_error(ours[name], x) <= bound, name


def test_rows_without_visible_keys_have_finite_gradients() -> None:
    """torch's gradients are NaN there."""
    network = modern_bert()
    actual = derivatives(network, replace_sdpa)
    assert any(x.isnan().any() for x in derivatives(network, torch_math).values())
    with jvp_attn.backend("math"):
        assert_close(actual, derivatives(network, replace_sdpa))


@of_all
def test_memory_is_linear_in_the_sequence_length(build: Build) -> None:
    networks = build(16), build(24)  # with 64 and 144 tokens

    def growth(around: Around) -> list[float]:
        """The growth of the memory peak and of the largest tensor."""
        memory = [
            peak_and_largest_allocation(lambda network=network: derivatives(network, around))
            for network in networks
        ]
        return [after / before for before, after in zip(*memory, strict=True)]

    with small_tiles(scores=2**12, rows=1):
        assert max(growth(replace_sdpa)) <= 144 / 64
    assert min(growth(torch_math)) > 144 / 64
