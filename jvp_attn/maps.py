"""The contract between the autograd rules and a backend: four maps, closed under differentiation.

For one head, with S = s Q Kᵀ, P = softmax(S) and T = s (tQ Kᵀ + Q tKᵀ):

    forward           O = P V                           lse = logsumexp(S)
    forward_tangent   tO = (P∘(T − mu)) V + P tV        mu  = rowsum(P∘T), the tangent of lse
    backward          the VJP of `forward`
    tangent_backward  the VJP of `forward_tangent`

The JVP of `forward` is `forward_tangent`; the JVP and the VJP of `backward` are made of
`forward_tangent` and `tangent_backward`. So these four give every first and second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """What an attention call needs besides its tensors.

    Attributes:
        softmax_scale: s in S = s Q Kᵀ.
        causal: row i of M sees column j of N where j ≤ i + N − M (aligned at the bottom right).
        backend: name of the backend that computes the four maps.
    """

    softmax_scale: float
    causal: bool = False
    backend: str = "blockwise"


Gradients = tuple[Tensor, Tensor, Tensor]
TangentGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class AttentionMaps(Protocol):
    """What a backend implements. None stands for a tensor of zeros and is never materialised.

    Shapes: q and tq (batch, seqlen_q, heads, head_dim); k and tk (batch, seqlen_k, heads_k,
    head_dim); v and tv (batch, seqlen_k, heads_k, head_dim_v); out, tout and their cotangents
    (batch, seqlen_q, heads, head_dim_v); lse, mu and their cotangents (batch, heads, seqlen_q),
    float32 (float64 for float64 inputs). Inputs are validated and never modified.
    Rows that see no key: out = tout = mu = 0, lse = −inf, no gradient.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""

    def forward_tangent(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (out, lse, tout, mu)."""

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        options: AttentionOptions,
    ) -> Gradients:
        """Return the gradients of (q, k, v)."""

    def tangent_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        out: Tensor,
        lse: Tensor,
        tout: Tensor,
        mu: Tensor,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        grad_tout: Tensor | None,
        grad_mu: Tensor | None,
        options: AttentionOptions,
        needs_tangent_grads: tuple[bool, bool, bool],
    ) -> tuple[Gradients, TangentGradients]:
        """Return the gradients of (q, k, v) and of (tq, tk, tv); those not needed are None."""
