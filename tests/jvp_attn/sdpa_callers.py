"""Functions and modules that call torch's attention, for the tests of `replace_sdpa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.jvp_attn.attention_cases import Tensors, randn

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 5, 4, 3
WIDTH = HEADS * HEAD_DIM

Function = Callable[[Tensor], Tensor]


def self_attention(x: Tensor, **options: Any) -> Tensor:
    """(batch, heads, seqlen, head_dim) → the same."""
    return F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


def point_and_direction(*shape: int) -> Tensors:
    return randn(*shape, seed="x"), randn(*shape, seed="tx")


X, TX = point_and_direction(BATCH, HEADS, SEQLEN, HEAD_DIM)
TOKENS, TTOKENS = point_and_direction(BATCH, SEQLEN, WIDTH)


def by_torch(of: Callable[..., Any], *args: Any) -> Any:
    """The result with torch's backend MATH, which has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return of(*args)


# ----------------------------------------------------------------------------
# Modules of torch

MODULES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "MultiheadAttention": (
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda module, x: module(x, x.sin(), x.cos(), need_weights=False)[0],
    ),
    "MultiheadAttention, causal": (
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda module, x: module(
            *(x, x, x),
            attn_mask=nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=x.dtype),
            is_causal=True,
            need_weights=False,
        )[0],
    ),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True),
        lambda module, x: module(x),
    ),
    "TransformerDecoderLayer": (
        nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True),
        lambda module, x: module(x, x.sin()),
    ),
    "TransformerEncoder, padded": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True), 1
        ),
        lambda module, x: module(
            x, src_key_padding_mask=torch.arange(SEQLEN) >= torch.tensor([[SEQLEN], [SEQLEN - 2]])
        ),
    ),
}
for module, _ in MODULES.values():
    module.eval().double()
    for name, weight in module.named_parameters():
        weight.data = randn(*weight.shape, seed=name)
