"""Functions to compile and comparisons with eager, shared by the tests of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from jvp_attn import flash_attn_jvp
from tests.jvp_attn.attention_cases import Attention, Tensors, assert_close, energy, named
from tests.jvp_attn.composition_autograd import leaves
from tests.jvp_attn.composition_features import ADDED, FEATURES, Feature

# Compiles a function.
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
# Values and derivatives of f at x along t, where f or its caller is compiled.
Derivative = Callable[[Attention, Tensors, Tensors, Compile], Any]


def eager(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def in_one_graph(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return flash_attn_jvp(q, k, v, attn_mask=ADDED, causal=True, return_lse=True)


# Shapes that fit the mask.
MASKED = next(feature for feature in FEATURES if feature.name == "additive mask")
by_name = {"ids": lambda it: getattr(it, "name", None) or it.__name__}


def jvp_along_q(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    q, k, v = leaves(x)
    outputs, output_tangents = compiled(lambda q, k, v: jvp(lambda q: f(q, k, v), (q,), t[:1]))(
        q, k, v
    )
    return (
        outputs,
        output_tangents,
        torch.autograd.grad(energy(outputs + output_tangents), (q, k, v)),
    )


def assert_equals_eager(
    derivative: Derivative, f: Attention, feature: Feature, compiled: Compile
) -> None:
    x, t = feature.primals(), feature.tangents()
    assert_close(named(derivative(f, x, t, compiled)), named(derivative(f, x, t, eager)))
