"""Checks of arguments. A message names the argument, the value given and the values allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from reprlib import repr

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from jvp_attn.types import AttentionOptions, Causal, Inputs, Tangents

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_DENSE = ("batch", "seqlen", "heads", "head_dim")
_PACKED = ("total", "heads", "head_dim")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q, k and v of shape (batch, seqlen, heads, head_dim).

    Raises:
        TypeError: an argument is not a tensor, or its dtype is unsupported, or dtypes differ.
        ValueError: a shape or device does not fit.
    """
    _check_tensors(q, k, v, _DENSE)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has batch {x.shape[0]} but q has {q.shape[0]} "
                f"(shapes {tuple(x.shape)} and {tuple(q.shape)})"
            )
    _check_heads(q, k, v)


def check_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Check q, k and v of shape (total, heads, head_dim), and cu_seqlens.

    `check_lengths` checks the values in cu_seqlens.

    Raises:
        TypeError: the type or dtype of an argument is unsupported, or dtypes differ.
        ValueError: a shape, device or number does not fit.
    """
    _check_tensors(q, k, v, _PACKED)
    _check_heads(q, k, v)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)
        if x.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be int32")
        if x.ndim != 1 or x.shape[0] == 0:
            raise ValueError(
                f"{name} must have shape (sequences + 1,), starting with 0, got {tuple(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} but q is on {q.device}; they must be on one device"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0] - 1} sequences but cu_seqlens_k has "
            f"{cu_seqlens_k.shape[0] - 1}; they must be as many"
        )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, bool) or not isinstance(length, int | torch.SymInt | Integral):
            raise TypeError(f"{name} must be an integer, got {type(length).__name__}")
        if length < 0:
            raise ValueError(f"{name} is {length}; it must not be negative")
        if isinstance(length, int) and length >= 2**63:
            raise ValueError(f"{name} is {length}; it must be below 2**63")


def check_seqused_k(seqused_k: Tensor | None, q: Tensor) -> None:
    """Check the lengths of padded keys; `check_lengths` checks their values.

    Raises:
        TypeError: it is not a tensor, or not int32.
        ValueError: its shape or device does not fit.
    """
    if seqused_k is None:
        return
    if not isinstance(seqused_k, Tensor):
        raise TypeError(f"seqused_k must be a torch.Tensor or None, got {type(seqused_k).__name__}")
    check_dense("seqused_k", seqused_k)
    if seqused_k.dtype != torch.int32:
        raise TypeError(f"seqused_k has dtype {seqused_k.dtype}; it must be int32")
    if seqused_k.shape != q.shape[:1]:
        raise ValueError(
            f"seqused_k must have shape (batch,) = {tuple(q.shape[:1])}, "
            f"got {tuple(seqused_k.shape)}"
        )
    if seqused_k.device != q.device:
        raise ValueError(
            f"seqused_k is on {seqused_k.device} but q is on {q.device}; they must be on one device"
        )


def check_lengths(inputs: Inputs, options: AttentionOptions) -> None:
    """Check the values in cu_seqlens and seqused_k.

    On a GPU that is an assertion on the device, which later operations report.

    Raises:
        ValueError: a sequence exceeds its tensor or max_seqlen, or a length is negative.
    """
    if inputs.seqused_k is not None:
        used, seqlen_k = _without_transforms(inputs.seqused_k), inputs.k.shape[1]
        _check_values(
            "seqused_k",
            used,
            (((used >= 0) & (used <= seqlen_k)).all(), f"seqused_k must be 0 to {seqlen_k}"),
        )
    if options.max_seqlens is None:
        return
    for name, ends, packed, longest in (
        ("q", inputs.cu_seqlens_q, inputs.q, options.max_seqlens[0]),
        ("k", inputs.cu_seqlens_k, inputs.k, options.max_seqlens[1]),
    ):
        if ends is None:
            continue
        total, lengths = packed.shape[1], ends.diff()
        _check_values(
            f"cu_seqlens_{name}",
            ends,
            (ends[0] == 0, f"cu_seqlens_{name} must start with 0"),
            ((lengths >= 0).all(), f"cu_seqlens_{name} must not decrease"),
            (
                ends[-1] <= total,
                f"cu_seqlens_{name} must not end beyond the {total} rows of {name}",
            ),
            (
                (lengths <= longest).all(),
                f"max_seqlen_{name} is {longest}, and no sequence may be longer",
            ),
        )


def _check_values(name: str, values: Tensor, *rules: tuple[Tensor, str]) -> None:
    for holds, rule in rules:
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(holds, rule)
        elif not holds:
            raise ValueError(f"{rule}; {name} is {_shortened(values)}")


def _without_transforms(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func, so that its values can be read."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_mask(
    mask: Tensor | None, q: Tensor, k: Tensor, mask_batch: int | None = None
) -> Tensor | None:
    """Check an attention mask and expand it to four dimensions.

    Its batch size is 1 or that of q, or mask_batch.

    Raises:
        TypeError: it is not a tensor, or its dtype is not supported.
        ValueError: its shape or device does not fit.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    check_dense("attn_mask", mask)
    dtypes = {torch.bool, q.dtype}
    if q.dtype in (torch.float16, torch.bfloat16):
        dtypes.add(torch.float32)
    if mask.dtype not in dtypes:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; supported where q has {q.dtype} are {allowed}"
        )
    if mask.device != q.device:
        raise ValueError(
            f"attn_mask is on {mask.device} but q is on {q.device}; they must be on one device"
        )
    batch = q.shape[0] if mask_batch is None else mask_batch
    scores = (batch, q.shape[2], q.shape[1], k.shape[1])
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(
        size not in (1, full) for size, full in zip(sizes, scores, strict=True)
    ):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to "
            f"(batch, heads, seqlen_q, seqlen_k) = {scores}"
        )
    return mask[(None,) * (4 - mask.ndim)]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, dimensions: tuple[str, ...]) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)
        if x.ndim != len(dimensions):
            raise ValueError(
                f"{name} must have {len(dimensions)} dimensions ({', '.join(dimensions)}), "
                f"got shape {tuple(x.shape)}"
            )
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


def check_dense(name: str, x: Tensor) -> None:
    """Check that a tensor has strides and no mask of its own.

    Raises:
        TypeError: it is nested, sparse, of oneDNN's layout (mkldnn), or a MaskedTensor.
    """
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one, layout {x.layout}: pack the "
            "sequences for flash_attn_varlen_jvp"
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {x.layout}: convert it by .to_dense()"
        )
    if isinstance(x, MaskedTensor):
        raise TypeError(
            f"{name} must be a dense tensor, got a MaskedTensor: pass x.get_data(), and mask keys "
            "by attn_mask"
        )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the last three dimensions, which end in (seqlen, heads, head_dim)."""
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(
            f"k and v must agree in seqlen and heads, got shapes {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k has head_dim {k.shape[-1]} but q has {q.shape[-1]}; they must be the same"
        )
    heads, heads_k = q.shape[-2], k.shape[-2]
    if heads % heads_k if heads_k else heads:
        raise ValueError(
            f"q has {heads} heads and k has {heads_k}: the heads of q must be a multiple of those "
            "of k and v"
        )


def _shortened(values: Tensor) -> list[int | str]:
    numbers: list[int | str] = values.flatten().tolist()
    return numbers if len(numbers) <= 10 else [*numbers[:5], "...", *numbers[-5:]]


def check_tangent(name: str, tangent: Tensor | None, primal: Tensor) -> None:
    """Check that a tangent has its primal's shape, dtype and device; None is a zero tangent.

    Raises:
        TypeError: it is not a tensor or has another dtype.
        ValueError: it has another shape or device.
    """
    if tangent is None:
        return
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tangent).__name__}")
    check_dense(name, tangent)
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


def check_mask_tangent(tangent: Tensor | None, mask: Tensor | None) -> None:
    """Check the tangent of a mask, which must be floating.

    Raises:
        TypeError: it is not a tensor, or the mask is boolean, or it has another dtype.
        ValueError: there is no mask, or it has another shape or device.
    """
    if tangent is None:
        return
    if mask is None:
        raise ValueError("tattn_mask is given but attn_mask is not; a tangent needs its primal")
    if mask.dtype == torch.bool:
        raise TypeError("tattn_mask is given but attn_mask is boolean, which has no tangent")
    check_tangent("tattn_mask", tangent, mask)


def check_tangents(inputs: Inputs, tangents: Tangents) -> None:
    """Check the tangents of dual numbers: torch guarantees only their shape.

    Raises:
        TypeError: one has another dtype than its primal.
        ValueError: one is on another device than its primal.
    """
    for name, tangent in tangents._asdict().items():
        argument = "attn_mask" if name == "mask" else name
        check_tangent(f"the tangent of {argument}", tangent, getattr(inputs, name))


def check_flags(**flags: bool) -> None:
    """Check options that are switched on or off.

    Raises:
        TypeError: one is not a bool.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__} {repr(flag)}")


def resolve_alignment(causal: bool) -> Causal:
    """The alignment of the causal mask, bottom-right as in flash-attn.

    Raises:
        TypeError: it is not a bool.
    """
    if not isinstance(causal, bool):
        raise TypeError(
            f"causal must be True or False, got {type(causal).__name__} {repr(causal)}; aligned "
            "at the top left it is the is_causal of scaled_dot_product_attention"
        )
    return Causal.BOTTOM_RIGHT if causal else Causal.NO


def check_not_in_jit_trace() -> None:
    """torch.jit.trace would record head_dim^−½ in float32, and options as constants.

    Raises:
        NotImplementedError: it is active.
    """
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace of attention is not supported: use torch.export.export or "
            "torch.compile, which record it as operators"
        )


def resolve_softmax_scale(
    softmax_scale: float | None, head_dim: int, name: str = "softmax_scale"
) -> float:
    """The scale to use: head_dim^−½ by default. Numbers of numpy become Python's.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not finite.
    """
    if softmax_scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float | Real):
        raise TypeError(
            f"{name} must be a number or None, got {type(softmax_scale).__name__}; "
            "a scale that needs a derivative can be multiplied into q"
        )
    try:
        scale = float(softmax_scale)
    except OverflowError:
        scale = math.inf
    # torch.compile traces comparisons of a scale that varies, but not math.isfinite.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {repr(softmax_scale)}")
    return scale
