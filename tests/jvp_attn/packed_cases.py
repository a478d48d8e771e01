"""Packed sequences for tests: their data, and oracles that compute one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from jvp_attn import flash_attn_varlen_jvp
from tests.jvp_attn.attention_cases import INPUTS, Attention, Case, Tensors, randn


@dataclass(frozen=True)
class PackedCase:
    """An attention problem of packed sequences. Its data are random, O(1), and the same each time.

    Its attentions return (out, lse) of q, k and v, as those of a `Case` do.
    """

    seqlens_q: tuple[int, ...] = (3, 5, 1, 4)
    seqlens_k: tuple[int, ...] = (6, 2, 4, 7)
    beyond: int = 0  # tokens after the last sequence
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 3
    head_dim_v: int = 6
    causal: bool = False
    softmax_scale: float | None = None
    with_tangent: str = "qkv"  # the others have none
    dtype: torch.dtype = torch.float64

    def data(self) -> dict[str, Tensor]:
        """q, k, v, and tq, tk, tv where there is such a tangent."""
        total_q, total_k = sum(self.seqlens_q) + self.beyond, sum(self.seqlens_k) + self.beyond
        shapes = {
            "q": (total_q, self.heads, self.head_dim),
            "k": (total_k, self.heads_k, self.head_dim),
            "v": (total_k, self.heads_k, self.head_dim_v),
        }
        shapes |= {f"t{x}": shapes[x] for x in self.with_tangent}
        return {x: randn(*shape, seed=x, dtype=self.dtype) for x, shape in shapes.items()}

    def primals(self) -> dict[str, Tensor]:
        """q, k, v."""
        return replace(self, with_tangent="").data()

    def point_and_direction(self) -> tuple[Tensors, Tensors]:
        """The inputs that have tangents, and these tangents."""
        data = self.data()
        names = [x for x in INPUTS.values() if f"t{x}" in data]
        return tuple(data[x] for x in names), tuple(data[f"t{x}"] for x in names)

    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens_q and cu_seqlens_k."""
        starts = (accumulate(x, initial=0) for x in (self.seqlens_q, self.seqlens_k))
        cu_seqlens_q, cu_seqlens_k = (torch.tensor([*x], dtype=torch.int32) for x in starts)
        return cu_seqlens_q, cu_seqlens_k

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of `flash_attn_varlen_jvp`."""
        return flash_attn_varlen_jvp(
            *(q, k, v, *(x.to(q.device) for x in self.cu_seqlens())),
            *(max(x, default=0) for x in (self.seqlens_q, self.seqlens_k)),
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            return_lse=True,
        )

    def one_by_one(self, attention_of: Callable[[Case], Attention]) -> Attention:
        """(out, lse), or only out, computed by an attention for each sequence."""

        def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            places = (pairwise(x.tolist()) for x in self.cu_seqlens())
            outs, lses = [], []
            for (start_q, stop_q), (start_k, stop_k) in zip(*places, strict=True):
                case = Case(
                    seqlen_q=stop_q - start_q,
                    seqlen_k=stop_k - start_k,
                    causal=self.causal,
                    softmax_scale=self.softmax_scale,
                )
                keys = slice(start_k, stop_k)
                out, *lse = attention_of(case)(
                    q[None, start_q:stop_q], k[None, keys], v[None, keys]
                )
                outs.append(out[0])
                lses += [x[0] for x in lse]
            outs.append(q.new_zeros(self.beyond, q.shape[1], v.shape[2]))
            if not lses:
                return (torch.cat(outs),)
            lses.append(lses[0].new_full((q.shape[1], self.beyond), -torch.inf))
            return torch.cat(outs), torch.cat(lses, -1)

        return packed

    def each_alone(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """(out, lse) of `flash_attn_jvp`, sequence by sequence."""
        return self.one_by_one(lambda case: case.ours)(q, k, v)

    def naive(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """(out, lse) of the naive formula, sequence by sequence."""
        return self.one_by_one(lambda case: case.naive)(q, k, v)

    def torch_math(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """(out,) of torch's own attention, sequence by sequence."""
        return self.one_by_one(lambda case: case.torch_math)(q, k, v)
