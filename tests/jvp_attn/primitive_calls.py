"""Arguments of the four primitives, for tests that call a backend or the operators directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from jvp_attn import AttentionOptions
from jvp_attn.backends import tiled
from jvp_attn.types import (
    AttentionBackend,
    Causal,
    Cotangents,
    Gradients,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)
from tests.jvp_attn.attention_cases import INPUTS, Case
from tests.jvp_attn.packed_cases import PackedCase

BF16 = torch.bfloat16

# Gradients of q, k, v and their tangents; none of a mask.
OF_QKV = (True, True, True, False, True, True, True, False)


@dataclass(frozen=True)
class PrimitiveCall:
    """Arguments of all primitives; each primitive takes some of them.

    `backward` takes the outputs and cotangents that it shares with `jvp_backward`, and the first
    half of the needs.
    """

    inputs: Inputs
    tangents: Tangents
    outputs: JvpOutputs
    cotangents: JvpCotangents
    options: AttentionOptions
    needs: Needs = OF_QKV

    def changed(self, part: str, **tensors: Tensor | None) -> PrimitiveCall:
        """The call with other tensors in one of its parts: `changed("cotangents", lse=None)`."""
        return replace(self, **{part: getattr(self, part)._replace(**tensors)})

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PrimitiveCall:
        """The call with the function applied to every tensor."""
        parts = ("inputs", "tangents", "outputs", "cotangents")
        return replace(
            self, **{x: tree_map_only(Tensor, function, getattr(self, x)) for x in parts}
        )

    def forward(self, backend: AttentionBackend) -> Outputs:
        return backend.forward(self.inputs, self.options)

    def forward_jvp(self, backend: AttentionBackend) -> JvpOutputs:
        return backend.forward_jvp(self.inputs, self.tangents, self.options)

    def backward(self, backend: AttentionBackend) -> Gradients:
        out, lse, _, _, out_lo, _, lse_lo = self.outputs
        return backend.backward(
            self.inputs,
            Outputs(out, lse, out_lo, lse_lo),
            Cotangents(self.cotangents.out, self.cotangents.lse),
            self.needs[:4],
            self.options,
        )

    def jvp_backward(self, backend: AttentionBackend) -> tuple[Gradients, Gradients]:
        return backend.jvp_backward(
            self.inputs, self.tangents, self.outputs, self.cotangents, self.needs, self.options
        )

    def all_four(self, backend: AttentionBackend) -> tuple[Any, ...]:
        """The results of every primitive."""
        return (
            self.forward(backend),
            self.forward_jvp(backend),
            self.backward(backend),
            self.jvp_backward(backend),
        )


def call_of(
    case: Case | PackedCase, *, backend: str = "cuda", return_lo: bool = True
) -> PrimitiveCall:
    """A call with the data of a case, and with cotangents made from its outputs.

    The outputs are those of the backend `tiled`; their low-order parts are zeros.
    """
    data = case.data()
    inputs = Inputs(data["q"], data["k"], data["v"], data.get("attn_mask"))
    tangents = Tangents(*(data.get(f"t{name}") for name in INPUTS.values()))
    options = AttentionOptions(0.25, causal_of(case), backend, return_lo)
    if isinstance(case, PackedCase):
        inputs = Inputs(*(x[None] for x in inputs[:3]), None, *case.cu_seqlens())
        tangents = Tangents(*(None if x is None else x[None] for x in tangents))
        longest = tuple(max(x, default=0) for x in (case.seqlens_q, case.seqlens_k))
        options = replace(options, max_seqlens=longest)
    out, lse, tout, mu, *_ = tiled.forward_jvp(inputs, tangents, options)
    low_order_parts = (x.new_zeros(x.shape) for x in (out, tout, lse))
    return PrimitiveCall(
        inputs,
        tangents,
        JvpOutputs(out, lse, tout, mu, *low_order_parts),
        JvpCotangents(out=tout, lse=mu, tout=out, mu=lse.sigmoid()),
        options,
    )


def bf16_case(head_dim: int = 64, **changes: Any) -> Case:
    """A case with the same head dim for all, in bfloat16 unless changed."""
    return Case(head_dim=head_dim, head_dim_v=head_dim, **{"dtype": BF16, **changes})


def bf16_packed_case(**changes: Any) -> PackedCase:
    return PackedCase(head_dim=64, head_dim_v=64, dtype=BF16, **changes)


def causal_of(case: Case | PackedCase) -> Causal:
    """The causal mask of a case."""
    if not case.causal:
        return Causal.NO
    is_torchs = isinstance(case, Case) and case.torchs_interface
    return Causal.TOP_LEFT if is_torchs else Causal.BOTTOM_RIGHT
