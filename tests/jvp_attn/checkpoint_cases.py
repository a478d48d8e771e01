"""Blocks, and ways to checkpoint them, for the tests of activation checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jvp_attn import checkpoint_jvp, flash_attn_jvp
from tests.jvp_attn.attention_cases import Tensors, randn
from tests.jvp_attn.composition_autograd import leaves

not_before_2_13 = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch before 2.13 has no checkpoint inside a jvp"
)

SHAPE = (2, 5, 8)  # (batch, seqlen, width)
HEADS = 2

# Calls a function with arguments, with or without a checkpoint.
Call = Callable[..., Any]


def kept(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return f(*args, **kwargs)


def nested(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint_jvp(partial(checkpoint_jvp, f), *args, **kwargs)


def bound(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint_jvp(partial(f, *args, **kwargs))


class Block(nn.Module):
    """A transformer block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        width = SHAPE[-1]
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.3)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        for name, weight in self.named_parameters():
            weight.data = randn(*weight.shape, seed=name)

    def forward(self, x: Tensor, condition: dict[str, Any] | None = None) -> Tensor:
        """(batch, seqlen, width) → the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.dropout(self.out(flash_attn_jvp(q, k, v, causal=True).flatten(2)).tanh())
        if condition is not None:
            (scale, gate), _ = condition["modulation"]
            x = x * scale.sin() * gate
        return x


def inputs(*names: str) -> Tensors:
    return leaves(tuple(randn(*SHAPE, seed=name) for name in names))


class ByName(nn.Module):
    """Passes a block to a checkpoint in one of the ways that a module may."""

    def __init__(self, call: Call, way: str) -> None:
        super().__init__()
        self.block, self.call, self.way = Block().eval(), call, way

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) → the same."""
        if self.way == "module":
            return self.call(self.block, x)
        if self.way == "method":
            return self.call(self.block.forward, x)
        if self.way == "partial":
            return self.call(partial(Block.forward, self.block), x)
        if self.way == "closure":
            return self.call(lambda x: self.block(x), x)
        return self.call(lambda modules, x: modules[0](x), [self.block], x)
