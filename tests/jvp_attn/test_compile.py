"""Attention, jvps of it and their gradients compile in one graph and equal eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import jvp

from tests.jvp_attn.attention_cases import Attention, Tensors, energy, randn
from tests.jvp_attn.compile_cases import (
    MASKED,
    Compile,
    Derivative,
    assert_equals_eager,
    by_name,
    in_one_graph,
    jvp_along_q,
    masked,
)
from tests.jvp_attn.composition_autograd import leaves, unpacked
from tests.jvp_attn.composition_features import FEATURES, Feature

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FIRST, LAST = randn(2, 2, seed="first"), randn(3, 2, seed="last")


def by_inductor(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="inductor", fullgraph=True)


def network(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Attention between other operations, in another layout."""
    heads_first = (q @ FIRST).tanh().transpose(1, 2).contiguous()
    out, lse = masked(heads_first.transpose(1, 2), k, v)
    return (out @ LAST).sin(), lse


def forward_and_backward(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    x = leaves(x)
    outputs = compiled(f)(*x)
    return outputs, torch.autograd.grad(energy(outputs), x)


def jvp_and_backward(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, output_tangents = compiled(lambda x, t: jvp(f, x, t))(x, t)
    return outputs, output_tangents, torch.autograd.grad(energy(outputs + output_tangents), x + t)


def jvp_and_backward_through_the_tangent(
    f: Attention, x: Tensors, t: Tensors, compiled: Compile
) -> Any:
    x, t = leaves(x), leaves(t)
    _, output_tangents = compiled(lambda x, t: jvp(f, x, t))(x, t)
    return torch.autograd.grad(energy(output_tangents[:1]), x + t)


def jvp_without_grad(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    with torch.no_grad():
        return compiled(lambda x, t: jvp(f, x, t))(leaves(x), t)


def dual_numbers_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    def output_tangents(q: Tensor, tq: Tensor, k: Tensor, v: Tensor) -> Any:
        with fwAD.dual_level():
            return unpacked(f(fwAD.make_dual(q, tq), k, v))

    return compiled(output_tangents)(x[0], t[0], *x[1:])


OF_EVERY_FEATURE = [forward_and_backward, jvp_and_backward]
OF_A_NETWORK = [
    *(forward_and_backward, jvp_and_backward, jvp_and_backward_through_the_tangent),
    *(jvp_without_grad, jvp_along_q, dual_numbers_within),
]


@pytest.mark.parametrize("derivative", OF_EVERY_FEATURE, **by_name)
@pytest.mark.parametrize("feature", FEATURES, **by_name)
def test_a_compiled_feature_equals_eager(feature: Feature, derivative: Derivative) -> None:
    if feature.is_tangent and derivative is jvp_and_backward:
        pytest.skip("there is no jvp of a jvp")
    assert_equals_eager(derivative, feature.ours, feature, in_one_graph)


@pytest.mark.parametrize("derivative", OF_A_NETWORK, **by_name)
def test_a_compiled_network_equals_eager(derivative: Derivative) -> None:
    assert_equals_eager(derivative, network, MASKED, in_one_graph)


@pytest.mark.parametrize("derivative", OF_EVERY_FEATURE, **by_name)
def test_inductor_equals_eager(derivative: Derivative) -> None:
    assert_equals_eager(derivative, network, MASKED, by_inductor)
