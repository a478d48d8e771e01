"""The formula that the fuzzer compares with, in plain operations that torch differentiates.

It has several variants, equal in exact arithmetic, that round differently. How far their results
are from those in float64 is the error that a precision costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """An order of operations.

    Attributes:
        scale_first: whether q is scaled, or the scores are.
        divide_first: whether P is normalised before P V, or the product afterwards.
        seed: of a permutation of the head dims, which changes the order of sums, and of rounding
            errors of the weights and of the derivative of their sum; None is none.
        row_sum_error: relative error of that derivative, which delta is a part of.
    """

    scale_first: bool = True
    divide_first: bool = True
    seed: int | None = None
    row_sum_error: float = 0.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    visible: Tensor | bool,
    scale: float,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(s Q Kᵀ + mask) V and its logsumexp, computed in q's dtype.

    Args:
        q: (..., heads, seqlen_q, head_dim). k: (..., heads, seqlen_k, head_dim). v: (..., heads,
            seqlen_k, head_dim_v). All but the last two dimensions broadcast.
        mask: boolean or additive, broadcastable to the scores.
        visible: which keys the positions allow a row to see, broadcastable to the scores.
        scale: s.
        variant: the order of operations.

    Returns:
        out (..., heads, seqlen_q, head_dim_v), lse (..., heads, seqlen_q) and what rounding took
        from lse; 0, −inf and 0 in rows that see no key.
    """
    order, order_v = (_permutation(x.shape[-1], variant.seed) for x in (q, v))
    q, k, v = q[..., order], k[..., order], v[..., order_v]
    scores = (q * scale) @ k.mT if variant.scale_first else (q @ k.mT) * scale
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        return (scores @ v)[..., order_v.argsort()], lse, torch.zeros_like(lse)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask.detach() > -torch.inf
        visible = visible & seen
        if mask.dtype != torch.bool:
            scores = scores + mask.masked_fill(~seen, 0)
    visible = torch.as_tensor(visible).expand(scores.shape)
    alive = visible.any(-1, keepdim=True)
    # Rows that see no key are computed without a mask, and replaced afterwards.
    scores = scores.masked_fill(~visible & alive, -torch.inf)
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = _weights(scores, maximum, variant.seed)
    total = weights.sum(-1, keepdim=True)
    if variant.divide_first:
        out = (weights / _with_rounded_derivative(total.expand_as(weights), variant)) @ v
    else:
        out = weights @ v
        out = out / _with_rounded_derivative(total.expand_as(out), variant)
    lse = maximum + _with_rounded_derivative(total, variant).log()
    lse_lo = (maximum - lse.detach() + total.detach().log()).masked_fill(~alive, 0)
    out = out[..., order_v.argsort()].masked_fill(~alive, 0)
    return out, lse.masked_fill(~alive, -torch.inf).squeeze(-1), lse_lo.squeeze(-1)


def grouped(x: Tensor, heads: int) -> Tensor:
    """(..., heads_k, seqlen, dim) → (..., heads, seqlen, dim), each head repeated."""
    return x if x.shape[-3] in (1, heads) else x.repeat_interleave(heads // x.shape[-3], -3)


def causal(seqlen_q: int, seqlen_k: int | Tensor, columns: int, bottom_right: bool) -> Tensor:
    """(..., seqlen_q, columns): which keys the causal mask lets a row see."""
    row, column = torch.arange(seqlen_q)[:, None], torch.arange(columns)
    return column <= row + (seqlen_k - seqlen_q if bottom_right else 0)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    is_causal: bool,
    scale: float,
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """`attention` of packed sequences (heads, total, dim), one after another."""
    outs, lses = [], []
    ends_q, ends_k = (x.tolist() for x in cu_seqlens)
    places = [*zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    places.append(((ends_q[-1], q.shape[-2]), (0, 0)))  # of no sequence: they see no key
    for queries, keys in places:
        rows, columns = (slice(*x) for x in (queries, keys))
        m, n = (stop - start for start, stop in (queries, keys))
        visible = causal(m, n, n, bottom_right=True) if is_causal else True
        out, lse, _ = attention(
            *(q[..., rows, :], k[..., columns, :], v[..., columns, :]),
            None,
            visible,
            scale,
            variant,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def _with_rounded_derivative(x: Tensor, variant: Variant) -> Tensor:
    """x, whose derivatives have random errors.

    Row sums such as delta often cancel. They would be exact by chance where few terms are added.
    """
    if variant.seed is None:
        return x
    x = x.contiguous()
    return x + (x - x.detach()) * (variant.row_sum_error * rounding_errors(x, variant.seed))


def _weights(scores: Tensor, maximum: Tensor, seed: int | None) -> Tensor:
    """exp(scores − maximum), with the errors of scores that were rounded, and underflow.

    Only up to a limit: where scores are huge but equal, the weights are known all the same.
    """
    weights = (scores - maximum).exp()
    if seed is None:
        return weights
    weights = weights.masked_fill(weights < 8 * torch.finfo(scores.dtype).smallest_normal, 0)
    size = 1 + (scores.detach().abs() + maximum.abs()).clamp(max=1000)
    return weights * (1 + torch.finfo(scores.dtype).eps * size * rounding_errors(scores, seed))


def rounding_errors(x: Tensor, seed: int) -> Tensor:
    """Random numbers of either sign, from 0.5 to 1, of the shape and dtype of x."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
    return (errors + 0.5 * errors.sign()).to(x.dtype)


def _permutation(size: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
