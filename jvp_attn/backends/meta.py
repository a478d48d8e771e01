"""Results of the primitives before any key is seen: zeros, and −inf for lse.

Backends start from them. For fake and meta tensors, which have only shapes, dtypes and strides,
this module is a complete backend. Outputs of q's length have q's memory layout; gradients are
contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jvp_attn.types import (
    AttentionOptions,
    Cotangents,
    Gradients,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
    split_needs,
)


def forward(inputs: Inputs, options: AttentionOptions) -> Outputs:
    """O = 0, lse = −inf, and its low-order part 0 if requested."""
    lse_lo = new_rows(inputs).zero_() if options.return_lo else None
    return Outputs(new_out(inputs).zero_(), new_rows(inputs).fill_(-torch.inf), None, lse_lo)


def forward_jvp(inputs: Inputs, tangents: Tangents, options: AttentionOptions) -> JvpOutputs:
    """O = tO = mu = 0, lse = −inf, and its low-order part 0 if requested."""
    out, lse, _, lse_lo = forward(inputs, options)
    tout, mu = new_out(inputs).zero_(), new_rows(inputs).zero_()
    return JvpOutputs(out, lse, tout, mu, None, None, lse_lo)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    cotangents: Cotangents,
    needs: Needs,
    options: AttentionOptions,
) -> Gradients:
    """Zeros."""
    return _zeros(inputs, needs)


def jvp_backward(
    inputs: Inputs,
    tangents: Tangents,
    outputs: JvpOutputs,
    cotangents: JvpCotangents,
    needs: Needs,
    options: AttentionOptions,
) -> tuple[Gradients, Gradients]:
    """Zeros."""
    needs, tangent_needs = split_needs(needs)
    return _zeros(inputs, needs), _zeros(inputs, tangent_needs)


def new_out(inputs: Inputs) -> Tensor:
    """(batch, seqlen_q, heads, head_dim_v), uninitialised, its dimensions in the order of q's."""
    strides = inputs.q.stride()
    order = [0, 1, 2, 3]
    if strides[3] == 1:
        # An expanded dimension has stride 0, and comes first.
        order[:3] = sorted(order[:3], key=lambda i: -strides[i] if strides[i] else -torch.inf)
    shape = (*inputs.q.shape[:3], inputs.v.shape[3])
    return torch.empty_permuted(shape, order, dtype=inputs.q.dtype, device=inputs.q.device)


def new_rows(inputs: Inputs) -> Tensor:
    """(batch, heads, seqlen_q), uninitialised, float32 (float64 for float64)."""
    batch, seqlen_q, heads, _ = inputs.q.shape
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    return torch.empty((batch, heads, seqlen_q), dtype=dtype, device=inputs.q.device)


def new_gradient(x: Tensor) -> Tensor:
    """Of the shape and dtype of x, contiguous, uninitialised."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _zeros(inputs: Inputs, needs: Needs) -> Gradients:
    return Gradients(
        *(
            new_gradient(x).zero_() if needed and x is not None else None
            for x, needed in zip(inputs.primals, needs, strict=True)
        )
    )
