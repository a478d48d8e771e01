"""Checkpoints and torch.compile under `replace_sdpa`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.utils.checkpoint import CheckpointError, checkpoint

import jvp_attn
from jvp_attn import replace_sdpa
from jvp_attn.backends import tiled
from tests.jvp_attn.attention_cases import Tensors, assert_close, named, randn
from tests.jvp_attn.sdpa_callers import (
    BATCH,
    HEADS,
    MODULES,
    SEQLEN,
    TOKENS,
    TTOKENS,
    X,
    by_torch,
    self_attention,
)


def counted(f: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """The function; each call appends to the list."""

    def counting(*args: Any) -> Any:
        calls.append(None)
        return f(*args)

    return counting


BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Tensor.backward": lambda y, x: y.backward() or x.grad,
    "autograd.backward": lambda y, x: torch.autograd.backward(y) or x.grad,
    "autograd.grad": lambda y, x: torch.autograd.grad(y, x)[0],
}


def gradient_through_checkpoints(
    x: Tensor,
    *,
    forward_in: Any,
    backward_in: Any,
    backward: str = "Tensor.backward",
    use_reentrant: bool = False,
) -> dict[str, Tensor]:
    def block(x: Tensor) -> Tensor:
        return self_attention(x.sin(), is_causal=True).cos()

    x = x.clone().requires_grad_()
    with forward_in:
        y = x
        for _ in range(2):
            y = checkpoint(block, y, use_reentrant=use_reentrant)
    with backward_in:
        return {"grad": BACKWARDS[backward]((y**3).sum(), x)}


@pytest.mark.parametrize(
    ("backward", "use_reentrant"),
    [*((backward, False) for backward in BACKWARDS), ("Tensor.backward", True)],
)
def test_backward_inside_recomputes_checkpoints_with_the_same_attention(
    backward: str, use_reentrant: bool
) -> None:
    gradient = partial(
        gradient_through_checkpoints,
        *(X,),
        forward_in=nullcontext(),
        backward_in=nullcontext(),
        backward=backward,
        use_reentrant=use_reentrant,
    )
    calls = []
    counting = mock.patch.object(tiled, "forward", counted(tiled.forward, calls))
    with jvp_attn.backend("tiled"), replace_sdpa(), counting:
        actual = gradient()
    assert len(calls) == 4
    assert_close(actual, by_torch(gradient))


@pytest.mark.parametrize("heads", [HEADS, SEQLEN])
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_checkpoints_with_forward_and_backward_on_different_sides_raise(
    inside: str, heads: int
) -> None:
    """The recomputation saves other tensors, possibly of the same shapes."""
    around = {
        "forward_in": nullcontext() if inside == "backward" else replace_sdpa(),
        "backward_in": replace_sdpa() if inside == "backward" else nullcontext(),
    }
    x = randn(BATCH, heads, SEQLEN, SEQLEN, seed="x")
    with pytest.raises(CheckpointError):
        gradient_through_checkpoints(x, **around)


def test_reentrant_checkpoints_may_have_forward_and_backward_on_different_sides() -> None:
    inside, outside = (
        gradient_through_checkpoints(
            X, forward_in=around, backward_in=nullcontext(), use_reentrant=True
        )
        for around in (replace_sdpa(), nullcontext())
    )
    assert_close(inside, outside)


def jvp_of_module(x: Tensor, tx: Tensor) -> Tensors:
    module, call = MODULES["MultiheadAttention"]
    return jvp(lambda x: self_attention(call(module, x)[:, None]), (x,), (tx,))


def test_compiled_modules_can_be_called_inside() -> None:
    compiled = torch.compile(jvp_of_module, fullgraph=True, backend="aot_eager")
    expected = by_torch(jvp_of_module, TOKENS, TTOKENS)
    with replace_sdpa():
        assert_close(named(compiled(TOKENS, TTOKENS)), named(expected))
    with pytest.raises(Exception, match="_scaled_dot_product_flash_attention"):
        compiled(TOKENS, TTOKENS)


def test_compiled_code_can_enter_the_block() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, tx: Tensor) -> Tensors:
        with replace_sdpa():
            return jvp_of_module(x, tx)

    expected = by_torch(jvp_of_module, TOKENS, TTOKENS)
    assert_close(named(compiled(TOKENS, TTOKENS)), named(expected))
