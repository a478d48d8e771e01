"""The features of attention in docs/composition.md, each with an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
    replace_sdpa,
    scaled_dot_product_attention,
)
from tests.jvp_attn.attention_cases import Attention, Tensors, randn

# (q, k, v, mask, softmax_scale) → (out, lse), by a formula without our derivative rules.
Formula = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Feature:
    """A function of tensors that uses a feature of attention, and an oracle of it.

    Attributes:
        name: its name in docs/composition.md.
        shapes: of the primals, by their names.
        ours: a function of the primals that returns (out,) or (out, lse).
        oracle: makes the same function from a formula.
        torch_has_it: whether the formula can be torch's own attention.
        is_tangent: whether the function is itself a first derivative of attention.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    ours: Attention
    oracle: Callable[[Formula], Attention]
    torch_has_it: bool = True
    is_tangent: bool = False

    def primals(self) -> Tensors:
        """Random, O(1), the same each time."""
        return tuple(randn(*shape, seed=name) for name, shape in self.shapes.items())

    def tangents(self) -> Tensors:
        """One for each primal."""
        return tuple(randn(*shape, seed=f"t{name}") for name, shape in self.shapes.items())


# ----------------------------------------------------------------------------
# Formulas


def naive_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Plain operations, which torch differentiates itself."""
    with jvp_attn.backend("math"):
        return flash_attn_jvp(q, k, v, attn_mask=mask, softmax_scale=scale, return_lse=True)


def torch_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out of torch's own attention, by its backend MATH, and lse of the naive formula."""
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2), naive_formula(q, k, v, mask, scale)[1]


# ----------------------------------------------------------------------------
# Building blocks of features


def qkv(seqlen_q: int, seqlen_k: int, heads: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of q, k and v, with two heads of k."""
    return {"q": (2, seqlen_q, heads, 2), "k": (2, seqlen_k, 2, 2), "v": (2, seqlen_k, 2, 3)}


def visible(seqlen_q: int, seqlen_k: int, offset: int) -> Tensor:
    """Row i attends to column j if j ≤ i + offset."""
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(offset)


def with_options(attn_mask: Tensor | None = None, **options: Any) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = None if attn_mask is None else attn_mask.to(q.device)
        return flash_attn_jvp(q, k, v, attn_mask=mask, **options, return_lse=True)

    return attention


def formula_with(
    mask: Tensor | None = None, scale: float | None = None
) -> Callable[[Formula], Attention]:
    return lambda formula: lambda q, k, v: formula(q, k, v, mask, scale)


def lse_where_finite(attention: Attention) -> Attention:
    """The attention with an lse of 0, not −inf, in fully masked rows, so that sums are finite."""

    def of_seen(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*x)
        return out, torch.where(lse == -torch.inf, 0, lse)

    return of_seen


# Sequences of 2, 0, 1 queries and 3, 0, 2 keys.
CU_SEQLENS = torch.tensor([[0, 2, 2, 3], [0, 3, 3, 5]], dtype=torch.int32)


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_varlen_jvp(q, k, v, *CU_SEQLENS.to(q.device), 2, 3, return_lse=True)


def each_sequence(formula: Formula) -> Attention:
    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            formula(q[None, a:b], k[None, c:d], v[None, c:d])
            for (a, b), (c, d) in zip(*map(pairwise, CU_SEQLENS.tolist()), strict=True)
            if a < b
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]

    return one_by_one


def as_torch(function: Callable[..., Tensor]) -> Attention:
    """Torch's interface: causal at the top left, two query heads for each key head."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = function(*heads_first, is_causal=True, scale=0.7, enable_gqa=True)
        return (out.transpose(1, 2),)

    return attention


def rerouted(*arguments: Any, **options: Any) -> Tensor:
    with replace_sdpa():
        return F.scaled_dot_product_attention(*arguments, **options)


def causal_at_the_top_left(formula: Formula) -> Attention:
    return lambda q, k, v: formula(q, k, v, visible(3, 4, 0), 0.7)[:1]


def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = (slice(0, 2), slice(2, None))
    return merge_attention([flash_attn_jvp(q, k[:, i], v[:, i], return_lse=True) for i in parts])


def threaded_by_hand(*x: Tensor) -> Tensors:
    return flash_attn_with_tangent(*x, return_lse=True)


def tangent_of(formula: Formula) -> Attention:
    def attention(*x: Tensor) -> Tensors:
        (out, lse), (tout, mu) = torch.func.jvp(formula, x[:3], x[3:])
        return out, tout, lse, mu

    return attention


# ----------------------------------------------------------------------------
# The features

SEEN = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
SEEN_BY_BATCH = torch.stack([SEEN, ~SEEN]).unsqueeze(1)
ADDED = torch.where(SEEN, randn(2, 3, 4, seed="mask"), -torch.inf)

FEATURES = [
    Feature(
        "`flash_attn_jvp`",
        qkv(3, 3),
        lambda q, k, v: (flash_attn_jvp(q, k, v),),
        lambda formula: lambda q, k, v: formula(q, k, v)[:1],
    ),
    Feature(
        "`return_lse` with grouped heads",
        qkv(2, 3, heads=4),
        with_options(softmax_scale=0.7),
        formula_with(scale=0.7),
    ),
    Feature("`causal`", qkv(3, 4), with_options(causal=True), formula_with(visible(3, 4, 1))),
    Feature(
        "fully masked rows",
        qkv(4, 2),
        lse_where_finite(with_options(causal=True)),
        lambda formula: lse_where_finite(formula_with(visible(4, 2, -2))(formula)),
        torch_has_it=False,  # its gradients are NaN
    ),
    Feature(
        "boolean mask",
        qkv(3, 4, heads=4),
        with_options(SEEN_BY_BATCH),
        formula_with(SEEN_BY_BATCH),
    ),
    Feature("additive mask", qkv(3, 4), with_options(ADDED), formula_with(ADDED)),
    Feature(
        "derivatives of a mask",
        {**qkv(3, 3), "mask": (2, 1, 3)},
        lambda *x: flash_attn_jvp(*x[:3], attn_mask=x[3], return_lse=True),
        lambda formula: formula,
    ),
    Feature(
        "`flash_attn_varlen_jvp`",
        {"q": (3, 4, 2), "k": (5, 2, 2), "v": (5, 2, 3)},
        packed,
        each_sequence,
    ),
    Feature(
        "`scaled_dot_product_attention`",
        qkv(3, 4, heads=4),
        as_torch(scaled_dot_product_attention),
        causal_at_the_top_left,
    ),
    Feature("`replace_sdpa`", qkv(3, 4, heads=4), as_torch(rerouted), causal_at_the_top_left),
    Feature("`merge_attention`", qkv(3, 4), merged, lambda formula: formula),
    Feature(
        "`flash_attn_with_tangent`",
        {**qkv(2, 3), **{f"t{name}": shape for name, shape in qkv(2, 3).items()}},
        threaded_by_hand,
        tangent_of,
        is_tangent=True,
    ),
]
