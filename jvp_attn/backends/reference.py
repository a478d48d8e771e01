"""Backend `math`: the naive formula in plain differentiable operations, with quadratic memory.

For tests and comparison. PyTorch differentiates it, so it shares no code with the rules and
primitives that it checks. All inputs except masks must be finite, even masked keys and padding.
Derivatives taken under autocast are rounded by it, like those of torch's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jvp_attn.autocast import without_autocast
from jvp_attn.types import AttentionOptions, Causal, Inputs


@without_autocast
def attention(inputs: Inputs, options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(s Q Kᵀ + mask) V, its logsumexp and the low-order part of that.

    Args:
        inputs: see `Inputs`.
        options: see `AttentionOptions`.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in q's dtype; lse and lse_lo
        (batch, heads, seqlen_q), float32 (float64 for float64); lse_lo has no derivative. A row
        that sees no key has out 0, lse −inf and no derivative.
    """
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        inputs = inputs._replace(mask=_expanded_mask(inputs, options))
        return _attention(*inputs.primals, inputs.seqused_k, options)
    ends_q, ends_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    places = [
        (slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])) for i in range(len(ends_q) - 1)
    ]
    places.append((slice(ends_q[-1], None), slice(0, 0)))  # of no sequence: they see no key
    results = [
        _attention(inputs.q[:, queries], inputs.k[:, keys], inputs.v[:, keys], None, None, options)
        for queries, keys in places
    ]
    outs, lses, lses_lo = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2), torch.cat(lses_lo, 2)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqused_k: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[2] // max(k.shape[2], 1)
    # All factors are contiguous: torch fails in vmap over no tangents of a transposed factor.
    queries = q.transpose(1, 2).contiguous() * options.softmax_scale
    keys_transposed = k.permute(0, 2, 3, 1).repeat_interleave(group, dim=1)
    values = v.transpose(1, 2).repeat_interleave(group, dim=1)

    scores = (queries @ keys_transposed).to(torch.promote_types(q.dtype, torch.float32))
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        return (scores.to(q.dtype) @ values).transpose(1, 2), lse, torch.zeros_like(lse)
    visible = _visible(scores, options.causal, seqused_k)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask.detach() > -torch.inf
        visible = visible & seen
        if mask.dtype != torch.bool:
            scores = scores + mask.masked_fill(~seen, 0)
    alive = visible.any(-1, keepdim=True)
    # Rows that see no key are computed without a mask, and replaced afterwards.
    scores = scores.masked_fill(~visible & alive, -torch.inf)
    # Spelt out: torch's softmax and logsumexp cannot go backward through a dual number's tangent.
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total).to(q.dtype) @ values
    lse = maximum + total.log()
    lse_lo = (maximum - lse.detach()) + total.detach().log()
    out = out.masked_fill(~alive, 0)
    lse = lse.masked_fill(~alive, -torch.inf).squeeze(-1)
    return out.transpose(1, 2), lse, lse_lo.masked_fill(~alive, 0).squeeze(-1)


def _expanded_mask(inputs: Inputs, options: AttentionOptions) -> Tensor | None:
    """The mask with an entry for each example, or with one for all."""
    mask, batch, group = inputs.mask, inputs.q.shape[0], options.mask_group
    if mask is None or mask.shape[0] == 1 or mask.shape[0] == batch:
        return mask
    repeats = batch // (mask.shape[0] * group)
    return mask[None, :, None].expand(repeats, -1, group, -1, -1, -1).flatten(0, 2)


def _visible(scores: Tensor, causal: Causal, seqused_k: Tensor | None) -> Tensor:
    """Broadcastable to scores: which keys the queries see by their positions."""
    seqlen_q, seqlen_k = scores.shape[-2:]
    row = torch.arange(seqlen_q, device=scores.device)[:, None]
    column = torch.arange(seqlen_k, device=scores.device)
    keys = seqlen_k if seqused_k is None else seqused_k[:, None, None, None]
    visible = (column < keys) & (row >= 0)
    match causal:
        case Causal.NO:
            return visible
        case Causal.BOTTOM_RIGHT:
            return visible & (column <= row + keys - seqlen_q)
        case Causal.TOP_LEFT:
            return visible & (column <= row)
