"""What users call: attention that the transforms of torch.func and torch.autograd go through."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from jvp_attn.autograd.dispatch import (
    attention_with_tangent,
    backward_may_follow,
    differentiable_attention,
)
from jvp_attn.backends.select import resolve_backend
from jvp_attn.types import AttentionOptions, Causal, Inputs, Tangents
from jvp_attn.validation import (
    check_attention,
    check_mask,
    check_mask_tangent,
    check_packed_attention,
    check_tangent,
    resolve_alignment,
    resolve_softmax_scale,
)


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(s Q Kᵀ + mask) V, differentiable in forward and reverse mode and in both together.

    Under `torch.func.jvp` or `torch.autograd.forward_ad` the output and its tangent come from one
    pass over the keys, and tangents that are absent cost nothing. `.backward()` is exact through
    the output, its tangent, lse and the tangent of lse.

    Autocast has no effect: inputs are computed in the dtype that they have.

    With the CUDA extension, float16 and bfloat16 on a GPU of compute capability 8.0 or newer run
    on CUDA kernels; all else, gradients through a tangent where a head dim is above 128, and
    tangents and gradients of a mask, on tiled operations of torch.
    `python -m jvp_attn.info --shape ...` tells which, and why.

    What a row does not see cannot reach it, not even NaN. Only the CUDA kernels multiply it by
    zero: there k, v and their tangents must be finite everywhere, or rows become NaN.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k: (batch, seqlen_k, heads_k, head_dim), same dtype; heads is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v), same dtype. Head dims are 1 to 256.
        attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k), and never expanded. Boolean:
            True attends. Or of q's dtype, or float32 beside half precision: added to the scaled
            scores, −inf hiding a key; it may require grad and have a tangent.
        softmax_scale: s; head_dim^−½ by default.
        causal: row i sees key j where j ≤ i + seqlen_k − seqlen_q, aligned at the bottom right as
            in flash-attn; and where attn_mask lets it, too.
        deterministic: whether gradients have the same bits each time. With False the backward that
            no tangent is part of may be one kernel instead of two, which sums the gradient of q in
            an order that varies, in float32 memory of the shape of q, the rows of each sequence
            rounded up to a multiple of 128. So far that is on compute capability 9.0 alone,
            without attn_mask, for head dims from 72 to 128, multiples of 8, and tensors whose
            rows start at multiples of 16 bytes; all else is deterministic anyhow, and so is all
            under `torch.use_deterministic_algorithms(True)`.
        return_lse: also return lse.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), q's dtype; with return_lse also lse
        (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs), whose
        tangent is mu = rowsum(P∘T). Rows that see no key give 0, lse −inf and no gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        ValueError: `backend("cuda")` is asked for and cannot compute this; the message says why.
        NotImplementedError: a derivative of third order, from the transform that asks for it.

    Source: FlashAttention-2 (arXiv 2307.08691) for the primal, sCM (arXiv 2410.11081)
    for the tangent.
    """
    out, lse = attention(
        *(q, k, v, attn_mask),
        softmax_scale=softmax_scale,
        causal=resolve_alignment(causal),
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


@overload
def flash_attn_varlen_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attn_varlen_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attn_varlen_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_jvp` of sequences of different lengths that are packed one after the other.

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] and the keys likewise; either
    may be none. What comes after the last belongs to no sequence: out 0, lse −inf, no gradient.

    Args:
        q: (total_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k: (total_k, heads_k, head_dim), same dtype; heads is a multiple of heads_k.
        v: (total_k, heads_k, head_dim_v), same dtype. Head dims are 1 to 256.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1), int32, on q's device, rising from 0.
        max_seqlen_q, max_seqlen_k: no less than the longest sequence, so that nothing must wait for
            the device to tell.
        softmax_scale: head_dim^−½ by default.
        causal: aligned at the bottom right in each sequence.
        deterministic: as in `flash_attn_jvp`.
        return_lse: also return lse.

    Returns:
        out (total_q, heads, head_dim_v); with return_lse also lse (heads, total_q), float32
        (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. What cu_seqlens
            on a GPU hold is checked there, by an assertion that later operations report.
        NotImplementedError: a derivative of third order, from the transform that asks for it.

    Source: the interface of flash-attn's flash_attn_varlen_func.
    """
    check_packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs = Inputs(q[None], k[None], v[None], None, cu_seqlens_q, cu_seqlens_k)
    out, lse = differentiable_attention(
        inputs,
        AttentionOptions(
            softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[2]),
            causal=resolve_alignment(causal),
            backend=resolve_backend(*inputs[:2]),
            return_lo=backward_may_follow(q, k, v),
            max_seqlens=(max_seqlen_q, max_seqlen_k),
            deterministic=deterministic,
        ),
    )
    return (out[0], lse[0]) if return_lse else out[0]


@overload
def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    tattn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    tattn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    tattn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_jvp` for code that threads tangents by hand instead of using torch.func.jvp.

    Args:
        q, k, v, attn_mask, softmax_scale, causal, deterministic: as in `flash_attn_jvp`.
        tq, tk, tv, tattn_mask: tangents, each of its primal's shape, dtype and device. None is zero
            and costs nothing; without any tangent, those returned are zeros.
        return_lse: also return lse and its tangent.

    Returns:
        (out, out_tangent), or (out, out_tangent, lse, lse_tangent); shapes as in `flash_attn_jvp`.
        Reverse mode is exact through all of them, for all inputs and tangents.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: forward mode through this function (a jvp of a jvp).
    """
    check_attention(q, k, v)
    inputs = Inputs(q, k, v, check_mask(attn_mask, q, k))
    for name, tangent, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        check_tangent(name, tangent, primal)
    check_mask_tangent(tattn_mask, attn_mask)
    tangents = Tangents(tq, tk, tv, check_mask(tattn_mask, q, k))
    options = AttentionOptions(
        softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[3]),
        causal=resolve_alignment(causal),
        backend=resolve_backend(q, k),
        return_lo=backward_may_follow(*inputs, *tangents),
        deterministic=deterministic,
    )
    out, lse, tout, mu = attention_with_tangent(inputs, tangents, options)
    return (out, tout, lse, mu) if return_lse else (out, tout)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    softmax_scale: float | None,
    causal: Causal,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `flash_attn_jvp`, for either alignment of the causal mask."""
    check_attention(q, k, v)
    inputs = Inputs(q, k, v, check_mask(attn_mask, q, k))
    options = AttentionOptions(
        softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[3]),
        causal=causal,
        backend=resolve_backend(q, k),
        return_lo=backward_may_follow(*inputs),
        deterministic=deterministic,
    )
    return differentiable_attention(inputs, options)
