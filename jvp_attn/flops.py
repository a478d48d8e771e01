"""How many floating-point operations attention takes, for `torch.utils.flop_counter`.

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        jvp_attn.flash_attn_jvp(q, k, v)
    counter.get_total_flops()

Importing `jvp_attn` registers the formulas, which also serve fake and meta tensors. They count as
torch's do for its attention: 2 operations per multiplication of the matrix products, nothing for
the softmax, and all pairs of a query and a key, whatever causal, masks and seqused_k hide. The
primitives take these products, each with head_dim (d) or head_dim_v (v) columns:

    forward       Q Kᵀ (d), P V (v)                                                          2
    forward_jvp   those; tQ Kᵀ, Q tKᵀ (d), (P∘Tc) V, P tV (v)                                6
    backward      Q Kᵀ, dS K, dSᵀ Q (d), dO Vᵀ, Pᵀ dO (v)                                    5
    jvp_backward  those; tQ Kᵀ, Q tKᵀ, dT tK, dTᵀ tQ, dT K, dTᵀ Q (d),
                  dtO Vᵀ, dtO tVᵀ, (P∘Tc)ᵀ dtO, Pᵀ dtO (v)                                  15

Products with an absent tangent or cotangent, and those of gradients that nobody needs, are left
out. What a kernel computes twice to save memory counts once. The backend `math` consists of
operators of torch, which torch counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.flop_counter import register_flop_formula

from jvp_attn.autograd.ops import SIGNATURES, unpack
from jvp_attn.types import (
    AttentionOptions,
    Cotangents,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
    split_needs,
)


class Products(NamedTuple):
    """How many matrix products a primitive takes, over head_dim and over head_dim_v."""

    over_d: int
    over_v: int


def forward(inputs: Inputs) -> Products:
    """Those of `AttentionBackend.forward`."""
    return Products(1, 1)


def forward_jvp(inputs: Inputs, tangents: Tangents) -> Products:
    """Those of `AttentionBackend.forward_jvp`."""
    tq, tk, tv, tmask = _present(tangents)
    return Products(1 + tq + tk, 1 + (tq or tk or tmask) + tv)


def backward(inputs: Inputs, outputs: Outputs, cotangents: Cotangents, needs: Needs) -> Products:
    """Those of `AttentionBackend.backward`."""
    return jvp_backward(inputs, Tangents(), None, JvpCotangents(*cotangents), needs)


def jvp_backward(
    inputs: Inputs,
    tangents: Tangents,
    outputs: JvpOutputs | None,
    cotangents: JvpCotangents,
    needs: Needs,
) -> Products:
    """Those of `AttentionBackend.jvp_backward`."""
    needed, needed_t = split_needs(needs)
    tq, tk, tv, tmask = _present(tangents)
    dout, dlse, dtout, dmu = _present(cotangents)
    t = tq or tk or tmask
    dt = dtout or dmu
    ds = dout or dlse or (dt and t) or (dtout and tv)
    of_q = needed.q * (ds + (dt and tk)) + needed_t.q * dt
    of_k = needed.k * (ds + (dt and tq)) + needed_t.k * dt
    of_v = needed.v * (dout + (dtout and t)) + needed_t.v * dtout
    return Products(1 + tq + tk + of_q + of_k, dout + dtout + (dtout and tv) + of_v)


def _present(tensors: Iterable[Tensor | None]) -> tuple[bool, ...]:
    return tuple(x is not None for x in tensors)


# ----------------------------------------------------------------------------
# Formulas


def register_flop_formulas() -> None:
    """Register the formulas of all operators, once, before a `FlopCounterMode` is made."""
    for count in (forward, forward_jvp, backward, jvp_backward):
        name = count.__name__
        target = getattr(torch.ops.jvp_attn, name)
        register_flop_formula(target, get_raw=True)(_formula(name, count))


def _formula(name: str, count: Callable[..., Products]) -> Callable[..., int]:
    def flops(*arguments: Any, out_val: Any = None) -> int:
        inputs, *others, options = unpack(SIGNATURES[name], arguments)
        products = count(inputs, *others)
        head_dim, head_dim_v = inputs.q.shape[-1], inputs.v.shape[-1]
        per_pair = products.over_d * head_dim + products.over_v * head_dim_v
        return 2 * _pairs(inputs, options) * inputs.q.shape[2] * per_pair

    return flops


def _pairs(inputs: Inputs, options: AttentionOptions) -> int:
    """The number of pairs of a query and a key, per head."""
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        batch, seqlen_q = inputs.q.shape[:2]
        return batch * seqlen_q * inputs.k.shape[1]
    max_q, max_k = options.max_seqlens or (inputs.q.shape[1], inputs.k.shape[1])
    lengths_q = _lengths(inputs.cu_seqlens_q, max_q)
    lengths_k = _lengths(inputs.cu_seqlens_k, max_k)
    return sum(m * n for m, n in zip(lengths_q, lengths_k, strict=True))


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Of packed sequences. As in torch, all those of fake tensors have the greatest length."""
    is_fake = isinstance(cu_seqlens, FakeTensor | FunctionalTensor)
    if is_fake or cu_seqlens.device.type == "meta":
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()
