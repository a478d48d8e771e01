"""The contract between the autograd rules and a backend: four maps, closed under differentiation.

For one head, with S = s Q Kᵀ, P = softmax(S) and T = s (tQ Kᵀ + Q tKᵀ):

    forward           O = P V                           lse = logsumexp(S)
    forward_tangent   tO = (P∘(T − mu)) V + P tV        mu  = rowsum(P∘T), the tangent of lse
    backward          the VJP of `forward`
    tangent_backward  the VJP of `forward_tangent`

The JVP of `forward` is `forward_tangent`; the JVP and the VJP of `backward` are made of
`forward_tangent` and `tangent_backward`. So these four give every first and second derivative.

Residuals. A backward map needs gO·O and gT·tO row by row, and where O is half precision the error
of its rounding does not cancel there: it multiplies the mean of K into the gradient of Q. So the
first two maps also return what rounding took away, in the same dtype: out + out_residual is nearly
float32. They are results of their own, because autograd saves, batches and checkpoints results and
knows of nothing else; nothing is differentiated through them. A backend that needs no residuals
returns None, and one that needs them computes those that it is not given anew.
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
        residuals: whether to return residuals, which only a backward pass needs.
    """

    softmax_scale: float
    causal: bool = False
    backend: str = "blockwise"
    residuals: bool = True


# (out, lse, out_residual) and (out, lse, tout, mu, out_residual, tout_residual).
Outputs = tuple[Tensor, Tensor, Tensor | None]
TangentOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor]
TangentGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class AttentionMaps(Protocol):
    """What a backend implements. None stands for a tensor of zeros and is never materialised.

    Shapes: q and tq (batch, seqlen_q, heads, head_dim); k and tk (batch, seqlen_k, heads_k,
    head_dim); v and tv (batch, seqlen_k, heads_k, head_dim_v); out, tout, their residuals and
    cotangents (batch, seqlen_q, heads, head_dim_v); lse, mu and their cotangents
    (batch, heads, seqlen_q), float32 (float64 for float64 inputs). Inputs are validated and never
    modified.
    Rows that see no key: out = tout = mu = 0, lse = −inf, no gradient.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Outputs:
        """Return (out, lse, out_residual)."""

    def forward_tangent(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        options: AttentionOptions,
    ) -> TangentOutputs:
        """Return (out, lse, tout, mu, out_residual, tout_residual)."""

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        out_residual: Tensor | None,
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
        out_residual: Tensor | None,
        tout_residual: Tensor | None,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        grad_tout: Tensor | None,
        grad_mu: Tensor | None,
        options: AttentionOptions,
        needs_tangent_grads: tuple[bool, bool, bool],
    ) -> tuple[Gradients, TangentGradients]:
        """Return the gradients of (q, k, v) and of (tq, tk, tv); those not needed are None."""
