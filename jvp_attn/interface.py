"""What users call: attention that the transforms of torch.func and torch.autograd go through."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from jvp_attn import math_backend
from jvp_attn.backends import resolve_backend
from jvp_attn.functions import FlashAttention, FlashAttentionTangent
from jvp_attn.maps import AttentionOptions
from jvp_attn.validation import check_attention, check_tangent, resolve_softmax_scale


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attn_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(s Q Kᵀ) V, differentiable in forward and reverse mode and in both together.

    Under `torch.func.jvp` or `torch.autograd.forward_ad` the output and its tangent come from one
    pass over the keys, and tangents that are absent cost nothing. `.backward()` is exact through
    the output, its tangent, lse and the tangent of lse.

    With the CUDA extension, float16 and bfloat16 on a GPU of compute capability 8.0 or newer run
    on CUDA kernels; all else, and gradients through a tangent where a head dim is above 128, on
    tiled operations of torch. `python -m jvp_attn.info --shape ...` tells which, and why.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k: (batch, seqlen_k, heads_k, head_dim), same dtype; heads is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v), same dtype. Head dims are 1 to 256.
        softmax_scale: s; head_dim^−½ by default.
        causal: row i sees key j where j ≤ i + seqlen_k − seqlen_q, aligned at the bottom right as
            in flash-attn. Rows that see no key give 0, lse −inf and no gradient.
        return_lse: also return lse.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), q's dtype; with return_lse also lse
        (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs), whose
        tangent is mu = rowsum(P∘T).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        ValueError: `backend("cuda")` is asked for and cannot compute this; the message says why.
        NotImplementedError: a derivative of third order, from the transform that asks for it.

    Source: FlashAttention-2 (arXiv 2307.08691) for the primal, sCM (arXiv 2410.11081)
    for the tangent.
    """
    check_attention(q, k, v)
    scale = resolve_softmax_scale(softmax_scale, q.shape[3])
    options = AttentionOptions(
        scale, bool(causal), resolve_backend(q, k), _backward_may_follow(q, k, v)
    )
    out, lse = _attention(q, k, v, options)
    return (out, lse) if return_lse else out


@overload
def flash_attn_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
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
    softmax_scale: float | None = None,
    causal: bool = False,
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
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_jvp` for code that threads tangents by hand instead of using torch.func.jvp.

    Args:
        q, k, v, softmax_scale, causal: as in `flash_attn_jvp`.
        tq, tk, tv: tangents, each of its primal's shape, dtype and device. None is zero and
            costs nothing; without any tangent, those returned are zeros.
        return_lse: also return lse and its tangent.

    Returns:
        (out, out_tangent), or (out, out_tangent, lse, lse_tangent); shapes as in `flash_attn_jvp`.
        Reverse mode is exact through all of them, for all six inputs.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: forward mode through this function (a jvp of a jvp).
    """
    check_attention(q, k, v)
    for name, tangent, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        check_tangent(name, tangent, primal)
    scale = resolve_softmax_scale(softmax_scale, q.shape[3])
    inputs = [x for x in (q, k, v, tq, tk, tv) if x is not None]
    options = AttentionOptions(
        scale, bool(causal), resolve_backend(q, k), _backward_may_follow(*inputs)
    )
    out, lse, tout, mu = _attention_with_tangent(q, k, v, tq, tk, tv, options)
    return (out, tout, lse, mu) if return_lse else (out, tout)


def _attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    if options.backend == "math":
        return math_backend.attention(q, k, v, options)
    if _tangents_may_be_unpacked(q, k, v):
        duals = [fwAD.unpack_dual(x) for x in (q, k, v)]
        primals, tangents = [d.primal for d in duals], [d.tangent for d in duals]
        if any(t is not None for t in tangents):
            out, lse, tout, mu, *_ = FlashAttentionTangent.apply(*primals, *tangents, options)
            return fwAD.make_dual(out, tout), fwAD.make_dual(lse, mu)
    out, lse, _ = FlashAttention.apply(q, k, v, options)
    return out, lse


def _backward_may_follow(*tensors: Tensor) -> bool:
    """Under a transform of torch.func no tensor can tell whether an outer one wants gradients."""
    if not torch.is_grad_enabled():
        return False
    return bool(torch._C._functorch.get_interpreter_stack()) or any(
        x.requires_grad for x in tensors
    )


def _tangents_may_be_unpacked(*tensors: Tensor) -> bool:
    """Whether primal and tangent may be computed together, as two ordinary results.

    Not where the same dual level could afterwards be applied to a backward pass: with bare dual
    numbers, autograd.grad inside the dual level must carry tangents, and would find that the
    saved tensors have lost theirs. There the jvp rule of `FlashAttention` computes the tangent.
    Under torch.func the transforms are nested, and a gradient inside a jvp is a level of its own.
    """
    transforms = torch._C._functorch.get_interpreter_stack()
    if transforms:
        return transforms[-1].key() == torch._C._functorch.TransformType.Jvp
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if options.backend == "math":
        pairs = ((q, tq), (k, tk), (v, tv))
        tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in pairs)
        formula = partial(math_backend.attention, options=options)
        outputs: Any = torch.func.jvp(formula, (q, k, v), tangents)
        (out, lse), (tout, mu) = outputs
        return out, lse, tout, mu
    out, lse, tout, mu, *_ = FlashAttentionTangent.apply(q, k, v, tq, tk, tv, options)
    return out, lse, tout, mu
