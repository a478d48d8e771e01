"""Merging attention over disjoint sets of keys, as ring and split-KV attention do.

    lse = log Σ_i exp(lse_i)        O = Σ_i exp(lse_i − lse) O_i

Plain torch operations: PyTorch differentiates them to any order, through O_i and lse_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import overload

import torch
from torch import Tensor

from jvp_attn.validation import DTYPES, check_dense

Part = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
_NAMES = ("out", "lse", "lse_lo")


@overload
def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]: ...


@overload
def merge_attention(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]: ...


def merge_attention(parts: Sequence[Part]) -> Part:
    """The attention over all keys, from the attentions over disjoint sets of them.

    Exact, as are its derivatives if each part's lse is differentiated together with its out. The
    rounding of lse limits the accuracy of pairs (out, lse): where |lse| is huge, as in rows that an
    additive mask fills with −1e6, merge triples (out, lse, lse_lo).

    Args:
        parts: at least one (out, lse) or (out, lse, lse_lo), each as attention with
            `return_lse=True` or `return_lse_lo=True` returns them for the same queries: out
            (batch, seqlen_q, heads, head_dim_v), lse and lse_lo (batch, heads, seqlen_q); or
            packed, out (total_q, heads, head_dim_v), lse and lse_lo (heads, total_q); or with any
            number of dimensions in place of batch. out is float16, bfloat16, float32 or float64;
            lse and lse_lo float32, for float64 out float64. Where lse is −inf the part saw no key,
            and its out is ignored, even NaN.

    Returns:
        (out, lse) or (out, lse, lse_lo), shapes and dtypes as in each part, computed in lse's
        dtype. Rows that see no key in any part: out 0, lse −inf, lse_lo 0, no gradient.

    Raises:
        TypeError: a part is not a tuple of two tensors or, like all others, of three, or a dtype
            does not fit; the message names it.
        ValueError: parts is empty, or a shape or device does not fit.
    """
    _check_parts(parts)
    outs = [out for out, *_ in parts]
    lses = torch.stack([lse for _, lse, *_ in parts])  # (parts, ..., heads, seqlen_q)
    absent = lses == -torch.inf
    shift = lses.detach().amax(0)  # avoids overflow of exp; its derivative cancels
    exponents = lses - shift
    if has_lo := len(parts[0]) == 3:
        exponents = exponents + torch.stack([lo for *_, lo in parts]).detach()
    # Masked before exp: masking afterwards would give 0·∞ or 0·NaN in derivatives.
    weights = torch.where(absent, -torch.inf, exponents).exp()
    nowhere_seen = absent.all(0)
    total = torch.where(nowhere_seen, 1, weights.sum(0))
    out = reduce(
        add,
        (
            _along_rows(weight / total) * torch.where(_along_rows(gone), 0, out)
            for weight, gone, out in zip(weights, absent, outs, strict=True)
        ),
    )
    out, log_sum = out.to(outs[0].dtype), total.log()
    lse = shift + log_sum
    if not has_lo:
        return out, lse
    lse_lo = ((shift - lse) + log_sum).detach()
    return out, lse, torch.where(nowhere_seen, 0, lse_lo)


def _along_rows(x: Tensor) -> Tensor:
    """(..., heads, seqlen_q) → (..., seqlen_q, heads, 1)."""
    return x.transpose(-1, -2).unsqueeze(-1)


def _check_parts(parts: Sequence[Part]) -> None:
    if not isinstance(parts, Sequence):
        raise TypeError(f"parts must be a sequence of (out, lse), got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts is empty: there must be at least one (out, lse)")
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list):
            raise TypeError(
                f"parts[{i}] must be a tuple (out, lse) or (out, lse, lse_lo), got "
                f"{type(part).__name__}"
            )
        if len(part) not in (2, 3) or not all(isinstance(x, Tensor) for x in part):
            types = ", ".join(type(x).__name__ for x in part)
            raise TypeError(
                f"parts[{i}] must be tensors (out, lse) or (out, lse, lse_lo), got ({types})"
            )
        if len(part) != len(parts[0]):
            raise TypeError(
                f"parts[{i}] has {len(part)} tensors and parts[0] has {len(parts[0])}; either all "
                "parts have lse_lo or none"
            )
        for name, x in zip(_NAMES, part, strict=False):
            check_dense(f"parts[{i}]: {name}", x)
    out = parts[0][0]
    _check_first_part(*parts[0])
    for i, part in enumerate(parts):
        for name, x, first in zip(_NAMES, part, parts[0], strict=False):
            if x.dtype != first.dtype:
                raise TypeError(
                    f"parts[{i}]: {name} has dtype {x.dtype} but that of parts[0] has "
                    f"{first.dtype}; they must be the same"
                )
            if x.shape != first.shape:
                raise ValueError(
                    f"parts[{i}]: {name} has shape {tuple(x.shape)} but that of parts[0] has "
                    f"{tuple(first.shape)}; parts differ only in their keys"
                )
            if x.device != out.device:
                raise ValueError(
                    f"parts[{i}]: {name} is on {x.device} but out of parts[0] is on {out.device}; "
                    "they must be on one device"
                )


def _check_first_part(out: Tensor, *rows: Tensor) -> None:
    if out.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"parts[0]: out has dtype {out.dtype}; supported are {allowed}")
    if out.ndim < 3:
        raise ValueError(
            "parts[0]: out must have dimensions (..., seqlen_q, heads, head_dim_v), "
            f"got shape {tuple(out.shape)}"
        )
    *batch, seqlen_q, heads, _ = out.shape
    for name, x in zip(_NAMES[1:], rows, strict=False):
        if x.dtype != torch.promote_types(out.dtype, torch.float32):
            raise TypeError(
                f"parts[0]: {name} has dtype {x.dtype} and out {out.dtype}; {name} must be "
                "float32, or float64 with float64 out"
            )
        if x.shape != (*batch, heads, seqlen_q):
            raise ValueError(
                f"parts[0]: {name} has shape {tuple(x.shape)} but out has {tuple(out.shape)}: "
                f"{name} must be (..., heads, seqlen_q), here {(*batch, heads, seqlen_q)}"
            )
