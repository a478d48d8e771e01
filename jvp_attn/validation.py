"""Checks of what users pass in; a message names the argument, what was given, what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check (batch, seqlen, heads, head_dim) tensors that belong together.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not supported or not the same.
        ValueError: a shape or device does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim), "
                f"got shape {tuple(x.shape)}"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if q.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"q has dtype {q.dtype}; supported are {allowed}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} but q has {q.dtype}; they must be the same"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} but q is on {q.device}; they must be on one device"
            )
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has batch {x.shape[0]} but q has {q.shape[0]} "
                f"(shapes {tuple(x.shape)} and {tuple(q.shape)})"
            )
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"k and v must agree in seqlen and heads, got shapes {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has head_dim {k.shape[3]} but q has {q.shape[3]}; they must be the same"
        )
    heads, heads_k = q.shape[2], k.shape[2]
    if heads_k == 0 or heads == 0 or heads % heads_k:
        raise ValueError(
            f"q has {heads} heads and k has {heads_k}: the heads of q must be a positive multiple "
            "of those of k and v"
        )
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {x.shape[3]}; supported are 1 to {MAX_HEAD_DIM}")


def check_tangent(name: str, tangent: Tensor | None, primal: Tensor) -> None:
    """Check that a tangent has its primal's shape, dtype and device; None is a zero tangent.

    Raises:
        TypeError: it is no tensor or has another dtype.
        ValueError: it has another shape or device.
    """
    if tangent is None:
        return
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tangent).__name__}")
    if tangent.dtype != primal.dtype:
        raise TypeError(
            f"{name} has dtype {tangent.dtype} but its primal has {primal.dtype}; "
            "a tangent must have its primal's dtype"
        )
    if tangent.shape != primal.shape:
        raise ValueError(
            f"{name} has shape {tuple(tangent.shape)} but its primal has {tuple(primal.shape)}; "
            "a tangent must have its primal's shape"
        )
    if tangent.device != primal.device:
        raise ValueError(
            f"{name} is on {tangent.device} but its primal is on {primal.device}; "
            "a tangent must be on its primal's device"
        )


def resolve_softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale to use: head_dim^−½ where none is given.

    Raises:
        TypeError: it is no Python number.
        ValueError: it is not finite.
    """
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise TypeError(
            f"softmax_scale must be a Python number or None, got {type(softmax_scale).__name__}; "
            "a scale that needs a derivative can be multiplied into q"
        )
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)
