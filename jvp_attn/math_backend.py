"""Backend `math`: the naive formula in plain differentiable operations, with quadratic memory.

For tests and comparison. PyTorch derives every derivative of it by itself, so it shares nothing
with the rules and maps that it checks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jvp_attn.maps import AttentionOptions


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """softmax(s Q Kᵀ) V and its logsumexp.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim), heads a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v).
        options: scale and mask.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in q's dtype; lse (batch, heads, seqlen_q), float32
        (float64 for float64). A row that sees no key has out 0, lse −inf and no derivative.
    """
    group = q.shape[2] // k.shape[2]
    queries = q.transpose(1, 2) * options.softmax_scale
    keys = k.transpose(1, 2).repeat_interleave(group, dim=1)
    values = v.transpose(1, 2).repeat_interleave(group, dim=1)

    scores = queries @ keys.mT
    seqlen_q, seqlen_k = scores.shape[-2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if seqlen_k == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf, dtype=dtype)
        return (scores @ values).transpose(1, 2), lse
    dead_rows = 0
    if options.causal:
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        visible = visible.tril(seqlen_k - seqlen_q)
        scores = scores.masked_fill(~visible, -torch.inf)
        dead_rows = max(seqlen_q - seqlen_k, 0)
    # Leading rows may see no key: softmax of −inf alone is NaN, so they are cut off and put back.
    alive = scores[..., dead_rows:, :].to(dtype)
    # Spelt out: torch's softmax and logsumexp cannot go backward through a dual number's tangent.
    maximum = alive.detach().amax(-1, keepdim=True)
    weights = (alive - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total).to(q.dtype) @ values
    lse = (maximum + total.log()).squeeze(-1)
    out = torch.nn.functional.pad(out, (0, 0, dead_rows, 0))
    lse = torch.nn.functional.pad(lse, (dead_rows, 0), value=-torch.inf)
    return out.transpose(1, 2), lse
