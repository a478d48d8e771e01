"""Attention over the tokens of several ranks: Ulysses × ring, with every derivative.

Ulysses (2309.14509): an all-to-all gives each rank all tokens of its group for some of the heads;
another one takes the result back. Ring (2310.01889): keys and values travel around the group, each
rank attends to one chunk of keys at a time, and the partial results are merged:

    lse = log Σ_i exp(lse_i)        O = Σ_i exp(lse_i − lse) O_i

Both are exact, and so are their tangents and all gradients. Tangents travel in the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from jvp_attn import flash_attn_jvp, merge_attention
from rcm.distributed.collectives import AllToAll, Shift, apply_collective

_TOKENS, _HEADS = 1, 2


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: ProcessGroup,
    ulysses: ProcessGroup,
    tokens: Sequence[Sequence[slice]],
    softmax_scale: float | None = None,
) -> Tensor:
    """softmax(s Q Kᵀ) V of this rank's queries and the keys of all ranks of ring × ulysses.

    Args:
        q: (batch, share, heads, head_dim): the same sizes on all ranks. Any number of heads:
            Ulysses pads them with zeros.
        k, v: (batch, share, heads_k, head_dim) and (batch, share, heads_k, head_dim_v); heads is a
            multiple of heads_k.
        ring, ulysses: the groups of this rank. Groups of one rank send no messages.
        tokens: for each rank of the ring, which keys of its Ulysses group are no padding: slices of
            0..share · ulysses ranks. Padding never enters, whatever its values.
        softmax_scale: s, head_dim^−½ by default.

    Returns:
        (batch, share, heads, head_dim_v), q's dtype.
    """
    heads = q.shape[_HEADS]
    if ulysses.size() > 1:
        if k.shape[_HEADS] != heads:
            k, v = (x.repeat_interleave(heads // x.shape[_HEADS], _HEADS) for x in (k, v))
        if missing := -heads % ulysses.size():
            q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        q, k, v = apply_collective(AllToAll(ulysses, split=_HEADS, join=_TOKENS), q, k, v)
    out = _ring_attention(q, k, v, ring, tokens, softmax_scale)
    if ulysses.size() > 1:
        (out,) = apply_collective(AllToAll(ulysses, split=_TOKENS, join=_HEADS), out)
    return out[:, :, :heads]


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: ProcessGroup,
    tokens: Sequence[Sequence[slice]],
    softmax_scale: float | None,
) -> Tensor:
    if ring.size() == 1:
        return flash_attn_jvp(
            q, _select(k, tokens[0]), _select(v, tokens[0]), softmax_scale=softmax_scale
        )
    center = _center(_select(k, tokens[ring.rank()]))
    parts = []
    for step in range(ring.size()):
        if step:
            k, v = apply_collective(Shift(ring), k, v)
        # A chunk without tokens is computed too: all ranks must have the same graph, so that their
        # backward passes send the same messages.
        chunk = tokens[(ring.rank() - step) % ring.size()]
        parts.append(
            flash_attn_jvp(
                q,
                _select(k, chunk) - center,
                _select(v, chunk),
                softmax_scale=softmax_scale,
                return_lse_lo=True,
            )
        )
    return merge_attention(parts)[0]


def _center(k: Tensor) -> Tensor:
    """A constant near which the keys are, or 0 if they are spread around it.

    Attention does not depend on what is subtracted from all keys that a query sees, and neither do
    its derivatives. But where keys have a large mean, the parts of a query's gradient that come
    from single chunks are much larger than their sum, and so is what half precision rounds off
    them. The subtraction itself rounds keys that are spread around 0.
    """

    def of(x: Tensor) -> Tensor:
        if x.shape[_TOKENS] == 0:
            return x.new_zeros(())
        variance, mean = torch.var_mean(x.detach(), _TOKENS, correction=0, keepdim=True)
        return torch.where(mean.square() > 4 * variance, mean, 0)

    primal, tangent = fwAD.unpack_dual(k)
    return of(primal) if tangent is None else fwAD.make_dual(of(primal), of(tangent))


def _select(x: Tensor, tokens: Sequence[slice]) -> Tensor:
    parts = [x[:, part] for part in tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts, _TOKENS)
