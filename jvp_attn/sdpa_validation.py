"""Checks of what users pass to `scaled_dot_product_attention`, in its own terms."""

from __future__ import annotations

from torch import Tensor

from jvp_attn.validation import DTYPES, MAX_HEAD_DIM


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> None:
    """Check all that does not depend on how the arguments broadcast, but for data types.

    Raises:
        TypeError: an argument is no tensor.
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
    for name, x in (("query", query), ("value", value)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has head_dim {x.shape[-1]}; supported are 1 to {MAX_HEAD_DIM}"
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
        if is_causal:
            raise ValueError(
                "attn_mask and is_causal=True exclude each other, as in torch: hide later keys in "
                "attn_mask too"
            )


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check the data types that autocast leaves.

    Raises:
        TypeError: they are not supported, or not the same.
    """
    if query.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"query has dtype {query.dtype}; supported are {allowed}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} but query has {query.dtype}; they must be the same"
            )


def check_broadcast(attn_mask: Tensor, scores: tuple[int, ...]) -> None:
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
