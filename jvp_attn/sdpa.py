"""`scaled_dot_product_attention` with the signature of torch's, and with every derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from jvp_attn.autocast import has_autocast
from jvp_attn.interface import attention
from jvp_attn.types import Causal
from jvp_attn.validation import (
    DTYPES,
    check_dense,
    check_flags,
    check_not_in_jit_trace,
    resolve_softmax_scale,
)


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

    The arguments are those of torch, under autocast too. Differences:

    - Dropout is not supported.
    - A row that sees no key is 0 and has no gradient; in torch that depends on the backend.
    - A scale that is a tensor is an error; torch would detach it.

    Args:
        query: (..., heads, seqlen_q, head_dim), float16, bfloat16, float32 or float64. The
            heads may be absent, and any number of dimensions may precede them.
        key: (..., heads, seqlen_k, head_dim), same dtype.
        value: (..., heads, seqlen_k, head_dim_v), same dtype. All dimensions of the three
            except the last two broadcast.
        attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k), and never expanded: a pair
            bias (batch, 1, heads, seqlen_q, seqlen_k) takes one pass for all rows. Boolean: True
            attends. Or of query's dtype, or float32: added to the scaled scores, −inf masking
            a key; it may require grad and have a tangent. Or a
            `torch.nn.attention.bias.CausalBias`.
        dropout_p: 0.
        is_causal: row i sees key j if j ≤ i, aligned top-left. Not together with attn_mask.
        scale: a number of Python or numpy; head_dim^−½ by default.
        enable_gqa: the heads of query may be any multiple of those of key, and of value.

    Returns:
        (..., heads, seqlen_q, head_dim_v), query's dtype.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        NotImplementedError: dropout_p above 0; nested tensors; a derivative of third order.
    """
    check_not_in_jit_trace()
    _check_arguments(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    scale = resolve_softmax_scale(scale, query.shape[-1], "scale")
    causal = Causal.TOP_LEFT if is_causal else Causal.NO
    if isinstance(attn_mask, CausalBias):
        causal, attn_mask = _alignment(attn_mask, query, key), None
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    _check_dtypes(query, key, value)
    rank = max(query.ndim, key.ndim, value.ndim)
    query, key, value = (x[(None,) * (max(rank, 4) - x.ndim)] for x in (query, key, value))
    query, key, value = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        _check_broadcast(attn_mask, scores[-rank:])
        attn_mask = _autocast(_without_expanded_batch(attn_mask))
        if attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
            attn_mask = attn_mask.double()
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
    """Attention of (*batch, heads, seqlen, head_dim); batch is the same for all, of any rank."""
    order, mask_group = list(range(query.ndim - 3)), 1
    if attn_mask is not None:
        order, mask_group = _order_for_mask(attn_mask.shape[:-3], query.shape[:-3])
        attn_mask = attn_mask.flatten(0, -4)
    is_reordered = order != sorted(order)
    rows_first = query.stride(-3) <= query.stride(-2)
    if is_reordered:
        query, key, value = (x.permute(*order, -3, -2, -1) for x in (query, key, value))
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (query, key, value))
    out, *_ = attention(
        *(q, k, v, attn_mask),
        softmax_scale=scale,
        causal=causal,
        mask_group=mask_group,
    )
    out = out.transpose(1, 2).unflatten(0, query.shape[:-3])
    return _in_old_order(out, order, rows_first) if is_reordered else out


# ----------------------------------------------------------------------------
# Masks that vary along some dimensions of the batch, and are broadcast along others


def _order_for_mask(of_mask: Sequence[int], batch: Sequence[int]) -> tuple[list[int], int]:
    """An order of the batch's dimensions in which the flattened mask fits the flattened batch.

    Where the mask is broadcast between dimensions along which it varies, these dimensions go last.

    Args:
        of_mask: the sizes of the mask's batch dimensions, each 1 or that of batch.
        batch: the sizes of the batch dimensions.

    Returns:
        The order, and how many successive examples then share an entry of the mask.
    """
    order = list(range(len(batch)))
    varying = [d for d in order if of_mask[d] > 1]
    if not varying:
        return order, 1
    between = [d for d in range(varying[0], varying[-1]) if of_mask[d] < batch[d]]
    order = [d for d in order if d not in between] + between
    shared = order[order.index(varying[-1]) + 1 :]
    return order, max(math.prod([batch[d] for d in shared]), 1)


def _without_expanded_batch(mask: Tensor) -> Tensor:
    """The mask, of size 1 along batch dimensions of stride 0: flattening would copy these.

    A mask that may have a derivative stays: those of its elements may differ.
    """
    if mask.is_floating_point():
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(mask):
            return mask
        if mask.requires_grad or fwAD.unpack_dual(mask).tangent is not None:
            return mask
    for d in range(mask.ndim - 3):
        if mask.shape[d] > 1 and mask.stride(d) == 0:
            mask = mask.narrow(d, 0, 1)
    return mask


def _in_old_order(out: Tensor, order: list[int], rows_first: bool) -> Tensor:
    """Undo the reordering of the batch's dimensions, in shape and in memory.

    Args:
        out: (*batch, heads, seqlen_q, head_dim_v), the dimensions of batch in this order.
        rows_first: whether the rows of queries come before the heads in memory.
    """
    out = out.permute(*(order.index(d) for d in range(len(order))), -3, -2, -1)
    if rows_first:
        return out.transpose(-3, -2).contiguous().transpose(-3, -2)
    return out.contiguous()


# ----------------------------------------------------------------------------
# What the arguments mean to torch


def _alignment(bias: CausalBias, query: Tensor, key: Tensor) -> Causal:
    seqlens = query.shape[-2], key.shape[-2]
    if not hasattr(bias, "seq_len_q"):
        raise TypeError(
            "attn_mask is the result of an operation on a causal bias, which has no lengths: make "
            "one by causal_upper_left or causal_lower_right"
        )
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
    """Broadcast to one batch, with the same heads in key and value and a multiple in query."""
    heads, heads_k, heads_v = (x.shape[-3] for x in (query, key, value))
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        if any(heads % n if n else heads for n in (heads_k, heads_v)):
            raise ValueError(
                f"query has {heads} heads, key {heads_k} and value {heads_v}: with enable_gqa=True "
                "the heads of query must be a multiple of the others"
            )
        if heads_k != heads_v:
            key, value = (
                x.repeat_interleave(heads // max(x.shape[-3], 1), -3) for x in (key, value)
            )
        shapes = [(*shape[:-1], heads) for shape in shapes]
    try:
        *batch, heads = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}: all dimensions but the last two must broadcast"
            + ("" if enable_gqa else "; heads may be grouped with enable_gqa=True")
        ) from error
    (heads_k,) = torch.broadcast_shapes(key.shape[-3:-2], value.shape[-3:-2])
    return (
        query.expand(*batch, heads, -1, -1),
        key.expand(*batch, heads_k, -1, -1),
        value.expand(*batch, heads_k, -1, -1),
    )


# ----------------------------------------------------------------------------
# Checks, in the terms of torch's arguments


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Check everything except dtypes and broadcasting.

    Raises:
        TypeError: an argument has the wrong type, or a tensor is not dense.
        ValueError: a shape, device or number does not fit, or two arguments exclude each other.
        NotImplementedError: dropout; nested tensors.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise NotImplementedError(
                f"{name} is a nested tensor, which is not supported: pack the sequences for "
                "flash_attn_varlen_jvp, or pad them and hide the padding with attn_mask"
            )
        check_dense(name, x)
        if x.ndim < 2:
            raise ValueError(
                f"{name} must have shape (..., seqlen, head_dim), got {tuple(x.shape)}"
            )
        if x.device != query.device:
            raise ValueError(
                f"{name} is on {x.device} but query is on {query.device}; "
                "they must be on one device"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key has head_dim {key.shape[-1]} but query has {query.shape[-1]}; "
            "they must be the same"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value has seqlen {value.shape[-2]} but key has {key.shape[-2]}; they must be the same"
        )
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    if not isinstance(dropout_p, float | Real):
        raise TypeError(
            f"dropout_p must be a number, got {type(dropout_p).__name__}; supported is 0"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be a probability, 0 to 1")
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p is {dropout_p}, but attention with dropout is not supported: call .eval() "
            "on the model, or set its attention dropout to 0"
        )
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(
                f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}"
            )
        check_dense("attn_mask", attn_mask)
        if is_causal:
            raise ValueError(
                "attn_mask and is_causal=True exclude each other, as in torch: hide later keys in "
                "attn_mask too"
            )


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check the dtypes after autocast.

    Raises:
        TypeError: they are unsupported or differ.
    """
    if query.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"query has dtype {query.dtype}; supported are {allowed}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} but query has {query.dtype}; they must be the same"
            )


def _check_broadcast(attn_mask: Tensor, scores: tuple[int, ...]) -> None:
    """Check that a mask fits scores of shape (..., seqlen_q, seqlen_k).

    Raises:
        ValueError: it does not broadcast to them.
    """
    sizes = (1,) * (len(scores) - attn_mask.ndim) + tuple(attn_mask.shape)
    if len(sizes) > len(scores) or any(
        size not in (1, full) for size, full in zip(sizes, scores, strict=True)
    ):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to "
            f"(..., seqlen_q, seqlen_k) = {scores}"
        )
