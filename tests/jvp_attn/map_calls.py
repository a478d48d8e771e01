"""Arguments of the four maps, for tests that call maps or operators by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attention_cases import INPUTS, Case
from packed_cases import PackedCase
from torch import Tensor
from torch.utils._pytree import tree_map_only

from jvp_attn import AttentionOptions, blockwise
from jvp_attn.maps import (
    AttentionMaps,
    Causal,
    Cotangents,
    Gradients,
    Inputs,
    Needs,
    Outputs,
    TangentOutputs,
    Tangents,
)

# Gradients of q, k, v and their tangents; none of a mask.
OF_QKV = (True, True, True, False, True, True, True, False)


@dataclass(frozen=True)
class MapCall:
    """All that the maps take; each map takes a part of it.

    `backward` is given the outputs and the cotangents that it has in common with
    `tangent_backward`, and the first half of the needs.
    """

    inputs: Inputs
    tangents: Tangents
    outputs: TangentOutputs
    cotangents: Cotangents
    options: AttentionOptions
    needs: Needs = OF_QKV

    def changed(self, part: str, **tensors: Tensor | None) -> MapCall:
        """With other tensors in one of the parts: `changed("cotangents", lse=None)`."""
        return replace(self, **{part: getattr(self, part)._replace(**tensors)})

    def mapped(self, function: Callable[[Tensor], Tensor]) -> MapCall:
        """The function applied to every tensor."""
        parts = ("inputs", "tangents", "outputs", "cotangents")
        return replace(
            self, **{x: tree_map_only(Tensor, function, getattr(self, x)) for x in parts}
        )

    def forward(self, maps: AttentionMaps) -> Outputs:
        return maps.forward(self.inputs, self.options)

    def forward_tangent(self, maps: AttentionMaps) -> TangentOutputs:
        return maps.forward_tangent(self.inputs, self.tangents, self.options)

    def backward(self, maps: AttentionMaps) -> Gradients:
        out, lse, _, _, out_residual, _ = self.outputs
        return maps.backward(
            self.inputs,
            Outputs(out, lse, out_residual),
            Cotangents(self.cotangents.out, self.cotangents.lse),
            self.needs[:4],
            self.options,
        )

    def tangent_backward(self, maps: AttentionMaps) -> tuple[Gradients, Gradients]:
        return maps.tangent_backward(
            self.inputs, self.tangents, self.outputs, self.cotangents, self.needs, self.options
        )

    def all_four(self, maps: AttentionMaps) -> tuple[Any, ...]:
        """The results of every map."""
        return (
            self.forward(maps),
            self.forward_tangent(maps),
            self.backward(maps),
            self.tangent_backward(maps),
        )


def call_of(case: Case | PackedCase, *, backend: str = "cuda", residuals: bool = True) -> MapCall:
    """A call with the data of a case; cotangents are made of its outputs.

    Its outputs are those of the backend `blockwise`, with residuals of zeros.
    """
    data = case.data()
    inputs = Inputs(data["q"], data["k"], data["v"], data.get("attn_mask"))
    tangents = Tangents(*(data.get(f"t{name}") for name in INPUTS.values()))
    options = AttentionOptions(0.25, causal_of(case), backend, residuals)
    if isinstance(case, PackedCase):
        inputs = Inputs(*(x[None] for x in inputs[:3]), None, *case.cu_seqlens())
        tangents = Tangents(*(None if x is None else x[None] for x in tangents))
        longest = tuple(max(x, default=0) for x in (case.seqlens_q, case.seqlens_k))
        options = replace(options, max_seqlens=longest)
    out, lse, tout, mu, *_ = blockwise.forward_tangent(inputs, tangents, options)
    return MapCall(
        inputs,
        tangents,
        TangentOutputs(out, lse, tout, mu, out.new_zeros(out.shape), out.new_zeros(out.shape)),
        Cotangents(out=tout, lse=mu, tout=out, mu=lse.sigmoid()),
        options,
    )


def causal_of(case: Case | PackedCase) -> Causal:
    """How a case hides later keys."""
    if not case.causal:
        return Causal.NO
    is_torchs = isinstance(case, Case) and case.torchs_interface
    return Causal.TOP_LEFT if is_torchs else Causal.BOTTOM_RIGHT
