"""The public attention functions, which all transforms of torch.func and torch.autograd support."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

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
    check_flags,
    check_mask,
    check_mask_tangent,
    check_not_in_jit_trace,
    check_packed_attention,
    check_seqused_k,
    check_tangent,
    resolve_alignment,
    resolve_softmax_scale,
)


class PackedKwargs(TypedDict, total=False):
    """Keyword options of `flash_attn_varlen_jvp`."""

    softmax_scale: float | None
    causal: bool
    deterministic: bool


class AttentionKwargs(PackedKwargs, total=False):
    """Keyword options of `flash_attn_jvp`."""

    attn_mask: Tensor | None
    seqused_k: Tensor | None


class TangentKwargs(AttentionKwargs, total=False):
    """Keyword options of `flash_attn_with_tangent`."""

    tattn_mask: Tensor | None


# ----------------------------------------------------------------------------
# Dense attention


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_lse_lo: Literal[False] = False,
    **options: Unpack[AttentionKwargs],
) -> Tensor: ...


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_lse_lo: Literal[False] = False,
    **options: Unpack[AttentionKwargs],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_lse_lo: Literal[True],
    **options: Unpack[AttentionKwargs],
) -> tuple[Tensor, Tensor, Tensor]: ...


def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: bool = False,
    return_lse_lo: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(s Q Kᵀ + mask) V, differentiable in forward and reverse mode and in both together.

    Under `torch.func.jvp` or `torch.autograd.forward_ad` one pass over the keys computes the output
    and its tangent; absent tangents cost nothing. `.backward()` is exact through the output, its
    tangent, lse and the tangent of lse.

    Autocast has no effect: attention is computed in the dtype of the inputs.

    With the CUDA extension, CUDA kernels compute float16 and bfloat16 on GPUs of compute capability
    8.0 or newer. Tiled torch operations compute the rest, gradients through a tangent with a head
    dim above 128, tangents and gradients of a mask, and everything with a head dim above 256, also
    on a CPU. `python -m jvp_attn.info --shape ...` prints which, and why.

    Masked and padded keys never affect a row, even if they are NaN. The CUDA kernels require finite
    k and v and finite tangents of them, even where they are masked or padded.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k: (batch, seqlen_k, heads_k, head_dim), same dtype; heads is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v), same dtype. Any size may be 0.
        attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k), and never expanded. Boolean:
            True attends. Or of q's dtype, or float32 with half precision: added to the scaled
            scores, −inf masking a key; it may require grad and have a tangent.
        seqused_k: (batch,) int32 on q's device, 0 to seqlen_k: how many keys of each example are
            used. The others are padding: they are not seen, and their gradients are 0.
        softmax_scale: s, a number of Python or numpy; head_dim^−½ by default.
        causal: row i sees key j if j ≤ i + seqlen_k − seqlen_q, aligned bottom-right as in
            flash-attn, and if attn_mask allows it. With seqused_k its value replaces seqlen_k.
        deterministic: whether gradients are bitwise reproducible. With False, the backward pass of
            attention without tangents may use one kernel instead of two. That kernel accumulates
            the gradient of q atomically, in nondeterministic order, in float32 memory of the shape
            of q with the rows of each sequence rounded up to a multiple of 128. It supports compute
            capability 9.0, no attn_mask, head dims that are multiples of 8 from 72 to 128, and
            tensors whose rows start at multiples of 16 bytes. Everything else is deterministic,
            and so is everything under `torch.use_deterministic_algorithms(True)`.
        return_lse: also return lse.
        return_lse_lo: also return lse and its low-order part, for `merge_attention`: in
            lse = max + log(sum) the logarithm is lost beside a huge maximum.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), q's dtype; with return_lse also lse
        (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs), whose
        tangent is mu = rowsum(P∘T); with return_lse_lo also lse_lo, of the shape and dtype of lse,
        what rounding took from it, without a derivative of its own. Rows that see no key have
        out 0, lse −inf, lse_lo 0 and no gradient.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. The values of seqused_k
            on a GPU are checked there, by an assertion that later operations report.
        ValueError: `backend("cuda")` or `backend("cpu")` is requested and cannot compute this; the
            message says why.
        NotImplementedError: a derivative of third order, from the transform that requests it.

    Source: FlashAttention-2 (arXiv 2307.08691) for the primal, sCM (arXiv 2410.11081)
    for the tangent.
    """
    check_not_in_jit_trace()
    check_flags(deterministic=deterministic, return_lse=return_lse, return_lse_lo=return_lse_lo)
    outputs = attention(
        *(q, k, v, attn_mask),
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=resolve_alignment(causal),
        deterministic=deterministic,
        return_lse_lo=return_lse_lo,
    )
    return _requested(outputs, return_lse, return_lse_lo)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None,
    causal: Causal,
    deterministic: bool = True,
    return_lse_lo: bool = False,
    mask_group: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, lse_lo) as in `flash_attn_jvp`, for either alignment of the causal mask.

    With a mask_group, attn_mask has the dimensions and the batch size that
    `jvp_attn.types.Inputs` describes.
    """
    check_attention(q, k, v)
    check_seqused_k(seqused_k, q)
    mask_batch = attn_mask.shape[0] if mask_group is not None and attn_mask is not None else None
    mask = check_mask(attn_mask, q, k, mask_batch)
    inputs = Inputs(q, k, v, mask, seqused_k=seqused_k)
    options = AttentionOptions(
        softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[3]),
        causal=causal,
        backend=resolve_backend(q, k, v),
        return_lo=return_lse_lo or backward_may_follow(*inputs),
        deterministic=deterministic,
        mask_group=mask_group or 1,
    )
    return differentiable_attention(inputs, options)


def _requested(
    outputs: tuple[Tensor, Tensor, Tensor | None], return_lse: bool, return_lse_lo: bool
) -> Any:
    if return_lse_lo:
        return outputs
    return outputs[:2] if return_lse else outputs[0]


# ----------------------------------------------------------------------------
# Packed sequences


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
    return_lse: Literal[False] = False,
    return_lse_lo: Literal[False] = False,
    **options: Unpack[PackedKwargs],
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
    return_lse: Literal[True],
    return_lse_lo: Literal[False] = False,
    **options: Unpack[PackedKwargs],
) -> tuple[Tensor, Tensor]: ...


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
    return_lse: bool = False,
    return_lse_lo: Literal[True],
    **options: Unpack[PackedKwargs],
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    return_lse_lo: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`flash_attn_jvp` of sequences of different lengths, packed one after another.

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] and the keys likewise; either
    may be empty. Rows after the last sequence belong to none: out 0, lse −inf, no gradient.

    Args:
        q: (total_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k: (total_k, heads_k, head_dim), same dtype; heads is a multiple of heads_k.
        v: (total_k, heads_k, head_dim_v), same dtype. Any size may be 0.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1), int32, on q's device, nondecreasing from 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, so that the host need not wait for
            the device.
        softmax_scale: head_dim^−½ by default.
        causal: aligned bottom-right in each sequence.
        deterministic, return_lse, return_lse_lo: as in `flash_attn_jvp`.

    Returns:
        out (total_q, heads, head_dim_v); with return_lse also lse (heads, total_q), float32
        (float64 for float64 inputs); with return_lse_lo also lse_lo, likewise.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. The values of
            cu_seqlens on a GPU are checked there, by an assertion that later operations report.
        NotImplementedError: a derivative of third order, from the transform that requests it.

    Source: the interface of flash-attn's flash_attn_varlen_func.
    """
    check_not_in_jit_trace()
    check_packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_flags(deterministic=deterministic, return_lse=return_lse, return_lse_lo=return_lse_lo)
    inputs = Inputs(q[None], k[None], v[None], None, cu_seqlens_q, cu_seqlens_k)
    options = AttentionOptions(
        softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[2]),
        causal=resolve_alignment(causal),
        backend=resolve_backend(*inputs.primals[:3]),
        return_lo=return_lse_lo or backward_may_follow(q, k, v),
        max_seqlens=(max_seqlen_q, max_seqlen_k),
        deterministic=deterministic,
    )
    out, lse, lse_lo = differentiable_attention(inputs, options)
    unpacked = out[0], lse[0], None if lse_lo is None else lse_lo[0]
    return _requested(unpacked, return_lse, return_lse_lo)


# ----------------------------------------------------------------------------
# Tangents as ordinary arguments


@overload
def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    return_lse_lo: Literal[False] = False,
    **options: Unpack[TangentKwargs],
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
    return_lse: Literal[True],
    return_lse_lo: Literal[False] = False,
    **options: Unpack[TangentKwargs],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    return_lse: bool = False,
    return_lse_lo: Literal[True],
    **options: Unpack[TangentKwargs],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...


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
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    return_lse: bool = False,
    return_lse_lo: bool = False,
) -> tuple[Tensor, ...]:
    """`flash_attn_jvp` for code that passes tangents explicitly instead of using torch.func.jvp.

    Args:
        q, k, v, attn_mask, seqused_k, softmax_scale, causal, deterministic: as in `flash_attn_jvp`.
        tq, tk, tv, tattn_mask: tangents, each of its primal's shape, dtype and device. None is zero
            and costs nothing; without any tangent, the returned tangents are zeros.
        return_lse: also return lse and its tangent.
        return_lse_lo: also return lse, its tangent and the low-order part of lse.

    Returns:
        (out, out_tangent), (out, out_tangent, lse, lse_tangent) or
        (out, out_tangent, lse, lse_tangent, lse_lo); shapes as in `flash_attn_jvp`. Reverse mode is
        exact through all but lse_lo, which has no derivative, for all inputs and tangents.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        NotImplementedError: forward mode through this function (a jvp of a jvp).
    """
    check_not_in_jit_trace()
    check_attention(q, k, v)
    check_seqused_k(seqused_k, q)
    check_flags(deterministic=deterministic, return_lse=return_lse, return_lse_lo=return_lse_lo)
    inputs = Inputs(q, k, v, check_mask(attn_mask, q, k), seqused_k=seqused_k)
    for name, tangent, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        check_tangent(name, tangent, primal)
    check_mask_tangent(tattn_mask, attn_mask)
    tangents = Tangents(tq, tk, tv, check_mask(tattn_mask, q, k))
    options = AttentionOptions(
        softmax_scale=resolve_softmax_scale(softmax_scale, q.shape[3]),
        causal=resolve_alignment(causal),
        backend=resolve_backend(q, k, v),
        return_lo=return_lse_lo or backward_may_follow(*inputs, *tangents),
        deterministic=deterministic,
    )
    out, lse, tout, mu, lse_lo = attention_with_tangent(inputs, tangents, options)
    results: Any = (out, tout, lse, mu, lse_lo)
    if return_lse_lo:
        return results
    return results[:4] if return_lse else results[:2]
