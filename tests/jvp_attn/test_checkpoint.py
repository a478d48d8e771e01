"""Activation checkpoints recompute attention in the backward pass exactly, or raise.

The jvp must be inside the checkpoint. A checkpoint inside a jvp would be recomputed after the jvp
has ended, without its tangents; torch detects this and raises. Inside a jvp, use `checkpoint_jvp`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from jvp_attn import flash_attn_jvp
from tests.jvp_attn.attention_cases import Named, Tensors, assert_close, energy, named, randn
from tests.jvp_attn.checkpoint_cases import HEADS, SHAPE, Call, kept
from tests.jvp_attn.composition_autograd import leaves
from tests.jvp_attn.operator_calls import OperatorCalls

checkpointed = partial(checkpoint, use_reentrant=False)


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        width = SHAPE[-1]
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        for name, weight in self.named_parameters():
            weight.data = randn(*weight.shape, seed=name)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) → the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.out(flash_attn_jvp(q, k, v, causal=True).flatten(2)).tanh()


BLOCK = Block()


def block(weights: Named, x: Tensor) -> Tensor:
    return functional_call(BLOCK, dict(weights), x)


def point_and_direction() -> tuple[Tensors, Named]:
    weights = {name: weight.detach().requires_grad_() for name, weight in BLOCK.named_parameters()}
    return leaves((randn(*SHAPE, seed="x"), randn(*SHAPE, seed="tx"))), weights


# ----------------------------------------------------------------------------
# Two blocks, with checkpoints around parts of them


def around_each_block(call: Call) -> Any:
    (x, _), weights = point_and_direction()
    y = call(block, weights, call(block, weights, x))
    return y, torch.autograd.grad(energy([y]), (x, *weights.values()))


def around_each_jvp(call: Call) -> Any:
    def step(weights: Named, x: Tensor, tx: Tensor) -> Tensors:
        return jvp(partial(block, weights), (x,), (tx,))

    (x, tx), weights = point_and_direction()
    y = call(step, weights, *call(step, weights, x, tx))
    return y, torch.autograd.grad(energy(y), (x, tx, *weights.values()))


def around_the_jvp(call: Call) -> Any:
    def both(weights: Named, x: Tensor, tx: Tensor) -> Tensors:
        return jvp(lambda x: block(weights, block(weights, x)), (x,), (tx,))

    (x, tx), weights = point_and_direction()
    y = call(both, weights, x, tx)
    return y, torch.autograd.grad(energy(y), (x, tx, *weights.values()))


@pytest.mark.parametrize("derivative", [around_each_block, around_each_jvp, around_the_jvp])
def test_a_checkpoint_changes_nothing(derivative: Callable[[Call], Any]) -> None:
    assert_close(named(derivative(checkpointed)), named(derivative(kept)), tolerance=0)


def test_attention_and_its_tangent_are_recomputed_once() -> None:
    with OperatorCalls() as calls:
        around_the_jvp(checkpointed)
    assert Counter(calls.names) == {"forward_jvp": 2 * 2, "jvp_backward": 2}


def test_a_selective_checkpoint_keeps_attention() -> None:
    def keep_attention(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        if operator == torch.ops.jvp_attn.forward_jvp.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    selective = partial(checkpointed, context_fn=contexts)
    with OperatorCalls() as calls:
        found = around_the_jvp(selective)
    assert Counter(calls.names) == {"forward_jvp": 2, "jvp_backward": 2}
    assert_close(named(found), named(around_the_jvp(kept)), tolerance=0)


def test_a_compiled_checkpoint_changes_nothing() -> None:
    def compiled(f: Callable[..., Any], *arguments: Any) -> Any:
        whole = torch.compile(partial(checkpointed, f), backend="aot_eager", fullgraph=True)
        return whole(*arguments)

    assert_close(named(around_the_jvp(compiled)), named(around_the_jvp(kept)))


# ----------------------------------------------------------------------------
# Inside a jvp


not_before_2_13 = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch before 2.13 has no checkpoint inside a jvp"
)


def jvp_around_checkpoints(call: Call) -> Any:
    (x, tx), weights = point_and_direction()
    y = jvp(lambda x: call(block, weights, call(block, weights, x)), (x,), (tx,))
    return y, (x, tx, *weights.values())


@not_before_2_13
def test_a_checkpoint_inside_a_jvp_changes_nothing_without_grad() -> None:
    with torch.no_grad():
        (found, _), (expected, _) = map(jvp_around_checkpoints, (checkpointed, kept))
    assert_close(named(found), named(expected), tolerance=0)


@not_before_2_13
def test_a_checkpoint_inside_a_jvp_raises_in_the_backward_pass() -> None:
    y, inputs = jvp_around_checkpoints(checkpointed)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        torch.autograd.grad(energy(y), inputs)


@pytest.mark.parametrize("with_grad", [True, False])
def test_a_reentrant_checkpoint_inside_a_jvp_raises(with_grad: bool) -> None:
    with torch.set_grad_enabled(with_grad), pytest.raises(RuntimeError, match="setup_context"):
        jvp_around_checkpoints(partial(checkpoint, use_reentrant=True))
