"""The contract between the autograd rules and a backend: four maps, closed under differentiation.

For one head, with S = s Q Kᵀ + mask, P = softmax(S) and T = s (tQ Kᵀ + Q tKᵀ) + tmask:

    forward           O = P V                           lse = logsumexp(S)
    forward_jvp   tO = (P∘(T − mu)) V + P tV        mu  = rowsum(P∘T), the tangent of lse
    backward          the VJP of `forward`
    jvp_backward  the VJP of `forward_jvp`

The JVP of `forward` is `forward_jvp`; the JVP and the VJP of `backward` are made of
`forward_jvp` and `jvp_backward`. So these four give every first and second derivative.

Residuals. A backward map needs dO·O and dtO·tO row by row, and where O is half precision the error
of its rounding does not cancel there: it multiplies the mean of K into the gradient of Q. So the
first two maps also return what rounding took away, in the same dtype: out + out_lo is nearly
float32. They are results of their own, because autograd saves, batches and checkpoints results and
knows of nothing else; nothing is differentiated through them. A backend that needs no residuals
returns None, and one that needs them computes those that it is not given anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from torch import Tensor


class Causal(IntEnum):
    """Which keys a query sees by its place, with M queries and N keys. As in csrc/params.h."""

    NO = 0
    BOTTOM_RIGHT = 1  # row i sees column j where j ≤ i + N − M, as in flash-attn
    TOP_LEFT = 2  # row i sees column j where j ≤ i, as in torch


@dataclass(frozen=True)
class AttentionOptions:
    """What an attention call needs besides its tensors.

    Attributes:
        softmax_scale: s in S = s Q Kᵀ.
        causal: whether, and how, later keys are hidden.
        backend: name of the backend that computes the four maps.
        return_lo: whether to return residuals, which only a backward pass needs.
        max_seqlens: for packed sequences, no less than the longest of queries and of keys.
        deterministic: whether gradients must have the same bits each time. If not, a backend may
            sum in an order that varies.
    """

    softmax_scale: float
    causal: Causal = Causal.NO
    backend: str = "tiled"
    return_lo: bool = True
    max_seqlens: tuple[int, int] | None = None
    deterministic: bool = True


class Inputs(NamedTuple):
    """What attention is computed from.

    Attributes:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim); heads is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v).
        mask: (batch, heads, seqlen_q, seqlen_k), each of them 1 where it does not vary. Boolean,
            False hiding a key, or floating, added to the scaled scores, −inf hiding a key.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1) int32, where packed sequences start and end in
            a batch of 1; queries and keys beyond the last belong to none. No mask then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class Tangents(NamedTuple):
    """Tangents of the inputs that have one, each of its input's shape; None is zero."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of the inputs, or of their tangents; None where it is not needed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


class Outputs(NamedTuple):
    """out (batch, seqlen_q, heads, head_dim_v), lse (batch, heads, seqlen_q), out's residual."""

    out: Tensor
    lse: Tensor
    out_lo: Tensor | None


class JvpOutputs(NamedTuple):
    """The outputs, their tangents (mu is that of lse), and residuals as long as out and tout."""

    out: Tensor
    lse: Tensor
    tout: Tensor
    mu: Tensor
    out_lo: Tensor | None
    tout_lo: Tensor | None


class Cotangents(NamedTuple):
    """Cotangents of the outputs; None is zero."""

    out: Tensor | None = None
    lse: Tensor | None = None
    tout: Tensor | None = None
    mu: Tensor | None = None


# Whether gradients of (q, k, v, mask), and further of their tangents, are needed.
Needs = tuple[bool, ...]


class AttentionBackend(Protocol):
    """What a backend implements. None stands for a tensor of zeros and is never materialised.

    lse, mu and their cotangents are float32 (float64 for float64 inputs); all else has the inputs'
    dtype, but for a mask and its tangent, which may be float32 beside half precision. Inputs are
    validated and never modified. A row that sees no key: out = tout = mu = 0, lse = −inf, and no
    gradient.
    """

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        """Return O, lse and a residual."""

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """Return O, lse, tO, mu and residuals."""

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> Gradients:
        """Return the gradients of the inputs against cotangents of O and lse."""

    def jvp_backward(
        self,
        inputs: Inputs,
        tangents: Tangents,
        outputs: JvpOutputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> tuple[Gradients, Gradients]:
        """Return the gradients of the inputs and of their tangents."""
