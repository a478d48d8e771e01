"""Autocast: `flash_attn_jvp` computes in the dtype of its inputs.

`scaled_dot_product_attention` casts its arguments as torch's function does, with their derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    replace_sdpa,
    scaled_dot_product_attention,
)
from tests.jvp_attn.attention_cases import Attention, Tensors, assert_close, energy, named, randn
from tests.jvp_attn.composition import Derivative
from tests.jvp_attn.composition_autograd import gradient_penalty, leaves
from tests.jvp_attn.composition_func import jvp_of_grad

SHAPE = (2, 5, 2, 4)  # (batch, seqlen, heads, head_dim)
autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def point_and_direction(dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """(q, k, v) and (tq, tk, tv); all require grad."""
    x = tuple(randn(*SHAPE, seed=name, dtype=dtype) for name in ("q", "k", "v"))
    return leaves(x), leaves(randn(*SHAPE, seed=name, dtype=dtype) for name in ("tq", "tk", "tv"))


def in_bfloat16(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with its inputs cast to bfloat16."""
    return lambda *x: f(*(y.to(torch.bfloat16) for y in x))


# ----------------------------------------------------------------------------
# flash_attn_jvp


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    mask = randn(SHAPE[1], SHAPE[1], seed="mask", dtype=q.dtype)
    return flash_attn_jvp(q, k, v, attn_mask=mask, causal=True, return_lse=True)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    ends = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_jvp(q, k, v, ends, ends, 7, 7, return_lse=True)


def outputs_and_all_gradients(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs, output_tangents = jvp(f, x, t)
    return outputs, output_tangents, torch.autograd.grad(energy(outputs + output_tangents), x + t)


def tangent_by_hand(f: Attention, x: Tensors, t: Tensors) -> Any:
    outputs = flash_attn_with_tangent(*x, *t, return_lse=True)
    return outputs, torch.autograd.grad(energy(outputs), x + t)


@pytest.mark.parametrize("f", [masked, packed])
@pytest.mark.parametrize(
    "derivative",
    [outputs_and_all_gradients, tangent_by_hand, jvp_of_grad, gradient_penalty],
)
def test_autocast_changes_no_derivative(derivative: Derivative, f: Attention) -> None:
    expected = derivative(f, *point_and_direction())
    with autocast():
        found = derivative(f, *point_and_direction())
    assert_close(named(found), named(expected), tolerance=0)


@pytest.mark.parametrize("f", [masked, packed])
def test_autocast_does_not_change_the_naive_formula(f: Attention) -> None:
    with jvp_attn.backend("math"):
        expected = jvp(f, *point_and_direction())
        with autocast():
            found = jvp(f, *point_and_direction())
    assert_close(named(found), named(expected), tolerance=0)


# ----------------------------------------------------------------------------
# Attention after a linear layer


def projected(x: Tensor, weight: Tensor) -> Tensors:
    """(out, lse) of attention after a linear layer."""
    q, k, v = F.linear(x.flatten(2), weight).unflatten(-1, (3, *SHAPE[2:])).unbind(2)
    return flash_attn_jvp(q, k, v, return_lse=True)


def of_layer(
    f: Attention,
    *,
    call: Callable[..., Any] = lambda f, *x: f(*x),
    forward_in: Callable[[], AbstractContextManager[None]] = nullcontext,
    backward_in: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Outputs, tangents and gradients for float32 weights and data."""
    (x, *_), (tx, *_) = point_and_direction()
    width = SHAPE[2] * SHAPE[3]
    (weight,) = leaves((randn(3 * width, width, seed="weight", dtype=torch.float32),))

    def value_and_tangent(x: Tensor, tx: Tensor, weight: Tensor) -> Any:
        return jvp(lambda x: f(x, weight), (x,), (tx,))

    with forward_in():
        outputs, output_tangents = call(value_and_tangent, x, tx, weight)
    with backward_in():
        return (
            outputs,
            output_tangents,
            torch.autograd.grad(energy(outputs + output_tangents), (x, tx, weight)),
        )


@pytest.mark.parametrize("backward_in", [nullcontext, autocast], ids=["outside", "inside"])
def test_after_a_linear_layer_attention_runs_in_half_precision(backward_in: Any) -> None:
    found = of_layer(projected, forward_in=autocast, backward_in=backward_in)
    (out, lse), _, gradients = found
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert_close(named(found), named(of_layer(in_bfloat16(projected))), tolerance=0)


def test_mixed_dtypes_from_autocast_raise() -> None:
    q, k, v = point_and_direction()[0]
    with autocast(), pytest.raises(TypeError, match=r"k has dtype torch\.bfloat16 but q has"):
        flash_attn_jvp(q, F.linear(k, torch.eye(SHAPE[3])), v)


def test_a_checkpoint_restores_autocast() -> None:
    checkpointed = partial(checkpoint, use_reentrant=False)
    found = of_layer(projected, call=checkpointed, forward_in=autocast)
    assert_close(named(found), named(of_layer(projected, forward_in=autocast)), tolerance=0)


@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast_compiles(where: str) -> None:
    def compiled(f: Callable[..., Any], *x: Tensor) -> Any:
        def under_autocast(*x: Tensor) -> Any:
            with autocast():
                return f(*x)

        within = f if where == "around" else under_autocast
        return torch.compile(within, backend="aot_eager", fullgraph=True)(*x)

    torch.compiler.reset()
    forward_in = autocast if where == "around" else nullcontext
    found = of_layer(projected, call=compiled, forward_in=forward_in)
    assert_close(named(found), named(of_layer(projected, forward_in=autocast)), tolerance=0)


# ----------------------------------------------------------------------------
# scaled_dot_product_attention


def rerouted(*x: Tensor, **options: Any) -> Tensor:
    with replace_sdpa():
        return F.scaled_dot_product_attention(*x, **options)


AS_TORCH = [scaled_dot_product_attention, rerouted]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", AS_TORCH)
def test_output_dtypes_are_those_of_torch(
    function: Callable[..., Tensor], dtype: torch.dtype, enabled: bool
) -> None:
    x = [y.detach().to(dtype) for y in point_and_direction()[0]]
    with autocast(enabled=enabled):
        assert function(*x).dtype == F.scaled_dot_product_attention(*x).dtype


@pytest.mark.parametrize("function", AS_TORCH)
def test_torchs_interface_casts_primals_and_tangents(function: Callable[..., Tensor]) -> None:
    def attention(*x: Tensor) -> Tensors:
        return (function(*x, is_causal=True),)

    with autocast():
        found = outputs_and_all_gradients(attention, *point_and_direction())
    assert found[0][0].dtype == found[1][0].dtype == torch.bfloat16
    expected = outputs_and_all_gradients(in_bfloat16(attention), *point_and_direction())
    assert_close(named(found), named(expected), tolerance=0)


@pytest.mark.parametrize("function", AS_TORCH)
def test_torchs_interface_accepts_mixed_dtypes(function: Callable[..., Tensor]) -> None:
    q, k, v = point_and_direction()[0]
    with autocast():
        assert_close(
            {"out": function(q, k.bfloat16(), v)}, {"out": in_bfloat16(function)(q, k, v)}, 0
        )
