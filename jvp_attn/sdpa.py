"""torch's own attention function with every derivative: the same call, computed by this package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from jvp_attn.autocast import has_autocast
from jvp_attn.interface import attention
from jvp_attn.sdpa_validation import check_arguments, check_broadcast, check_dtypes
from jvp_attn.types import Causal


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with the derivatives of `flash_attn_jvp`.

    The arguments mean what they mean to torch, under autocast too. What differs:

    - Dropout is not supported.
    - A row that sees no key gives 0 and has no gradient; in torch that depends on the backend.
    - Head dims are 1 to 256, and a scale that is a tensor is an error: torch would detach it.

    Args:
        query: (..., heads, seqlen_q, head_dim), float16, bfloat16, float32 or float64. There may be
            no heads, and any number of dimensions in front of them.
        key: (..., heads, seqlen_k, head_dim), same dtype.
        value: (..., heads, seqlen_k, head_dim_v), same dtype. All dimensions of the three but the
            last two broadcast.
        attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k), and never expanded. Boolean:
            True attends. Or of query's dtype, or float32: added to the scaled scores, −inf hiding a
            key; it may require grad and have a tangent. Or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: 0.
        is_causal: row i sees key j where j ≤ i, aligned at the top left. Not with an attn_mask.
        scale: head_dim^−½ by default.
        enable_gqa: let the heads of query be any multiple of those of key, and of value.

    Returns:
        (..., heads, seqlen_q, head_dim_v), query's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: dropout_p above 0; nested tensors; a derivative of third order.
    """
    check_arguments(query, key, value, attn_mask, dropout_p, is_causal)
    causal = Causal.TOP_LEFT if is_causal else Causal.NO
    if isinstance(attn_mask, CausalBias):
        causal, attn_mask = _alignment(attn_mask, query, key), None
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    check_dtypes(query, key, value)
    if attn_mask is not None:
        attn_mask = _autocast(attn_mask)
        if attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
            attn_mask = attn_mask.double()

    rank = max(query.ndim, key.ndim, value.ndim)
    query, key, value = (x[(None,) * (max(rank, 4) - x.ndim)] for x in (query, key, value))
    query, key, value = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        check_broadcast(attn_mask, scores[-rank:])
        attn_mask = attn_mask[(None,) * (query.ndim - attn_mask.ndim)]
    out = _attention(query, key, value, attn_mask, scale, causal)
    return out if rank >= 4 else out.reshape(out.shape[4 - rank :])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    causal: Causal,
) -> Tensor:
    """Attention of (*batch, heads, seqlen, head_dim), with the same batch of any rank in all."""
    batch = query.shape[:-3]
    if attn_mask is not None:
        sizes = attn_mask.shape[:-3]
        shared = [d for d, size in enumerate(sizes) if size == 1 < batch[d]]
        if shared and max(sizes) > 1:
            # No stride could share the mask along a part of the one dimension that they become.
            d = shared[0]
            mask = attn_mask.squeeze(d)
            slices = zip(query.unbind(d), key.unbind(d), value.unbind(d), strict=True)
            outs = [_attention(q, k, v, mask, scale, causal) for q, k, v in slices]
            return torch.stack(outs, d)
        attn_mask = attn_mask.flatten(0, -4)
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (query, key, value))
    out, _ = attention(q, k, v, attn_mask, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2).unflatten(0, batch)


# ----------------------------------------------------------------------------
# What the arguments mean


def _alignment(bias: CausalBias, query: Tensor, key: Tensor) -> Causal:
    seqlens = query.shape[-2], key.shape[-2]
    if (bias.seq_len_q, bias.seq_len_kv) != seqlens:
        raise ValueError(
            f"attn_mask is a causal bias for {bias.seq_len_q} queries and {bias.seq_len_kv} keys, "
            f"but query and key have {seqlens[0]} and {seqlens[1]}"
        )
    return Causal.TOP_LEFT if bias.variant == CausalVariant.UPPER_LEFT else Causal.BOTTOM_RIGHT


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch's autocast chooses for attention."""
    device = x.device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device)):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give all the same batch, key and value the same heads, and query a multiple of those."""
    heads, heads_k, heads_v = (x.shape[-3] for x in (query, key, value))
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        if heads_k == 0 or heads % heads_k or heads_v == 0 or heads % heads_v:
            raise ValueError(
                f"query has {heads} heads, key {heads_k} and value {heads_v}: with enable_gqa=True "
                "the heads of query must be a multiple of the others"
            )
        if heads_k != heads_v:
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        shapes = [(*shape[:-1], heads) for shape in shapes]
    try:
        *batch, heads = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}: all dimensions but the last two must broadcast"
            + ("" if enable_gqa else "; heads may be grouped with enable_gqa=True")
        ) from error
    heads_k = max(key.shape[-3], value.shape[-3])
    return (
        query.expand(*batch, heads, -1, -1),
        key.expand(*batch, heads_k, -1, -1),
        value.expand(*batch, heads_k, -1, -1),
    )
