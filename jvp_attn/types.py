"""What autograd rules and backends exchange: the four primitives, closed under differentiation.

For one head, with S = s Q Kᵀ + mask, P = softmax(S) and T = s (tQ Kᵀ + Q tKᵀ) + tmask:

    forward       O = P V                         lse = logsumexp(S)
    forward_jvp   tO = (P∘(T − mu)) V + P tV      mu  = rowsum(P∘T), the tangent of lse
    backward      the VJP of `forward`
    jvp_backward  the VJP of `forward_jvp`

The JVP of `forward` is `forward_jvp`. The JVP and the VJP of `backward` are combinations of
`forward_jvp` and `jvp_backward`. So these four give every first and second derivative.

Low-order parts. The backward primitives need dO·O and dtO·tO per row. If O is half precision, its
rounding error multiplies the mean of K into the gradient of Q. So the forward primitives also
return out_lo, what rounding took from out, in the same dtype: out + out_lo has nearly float32
precision. They are outputs like any other, because autograd saves, batches and checkpoints outputs
only; they have no derivative. A backend that does not need them returns None. A backend that needs
them recomputes them if they are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from torch import Tensor


class Causal(IntEnum):
    """The causal mask for M queries and N keys. Same values as the enum in csrc/params.h."""

    NO = 0
    BOTTOM_RIGHT = 1  # row i sees column j where j ≤ i + N − M, as in flash-attn
    TOP_LEFT = 2  # row i sees column j where j ≤ i, as in torch


@dataclass(frozen=True)
class AttentionOptions:
    """Everything that an attention call needs besides its tensors.

    Attributes:
        softmax_scale: s in S = s Q Kᵀ.
        causal: whether later keys are masked, and how the mask is aligned.
        backend: name of the backend that computes the primitives.
        return_lo: whether to return low-order parts, which only a backward pass needs.
        max_seqlens: for packed sequences, upper bounds of the lengths of queries and of keys.
        deterministic: whether gradients must be bitwise reproducible. If not, a backend may
            accumulate them atomically.
        mask_group: how many successive examples share an entry of the mask. Its entries repeat:
            example i has entry (i // mask_group) % (batch size of the mask).
    """

    softmax_scale: float
    causal: Causal = Causal.NO
    backend: str = "tiled"
    return_lo: bool = True
    max_seqlens: tuple[int, int] | None = None
    deterministic: bool = True
    mask_group: int = 1


class Inputs(NamedTuple):
    """The inputs of attention.

    Attributes:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim); heads is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v).
        mask: (mask_batch, heads, seqlen_q, seqlen_k), the last three 1 where the mask is
            broadcast. Boolean, False masking a key, or floating, added to the scaled scores, −inf
            masking a key. mask_batch · `AttentionOptions.mask_group` divides batch; with a
            mask_group of 1, a mask_batch of 1 is broadcast and one of batch is not.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1) int32, where packed sequences start and end in
            a batch of 1; queries and keys beyond the last belong to none. No mask then.
        seqused_k: (batch,) int32, how many keys of each example are used; the rest is padding.
            Not together with cu_seqlens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None

    @property
    def primals(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The inputs that may have tangents and gradients, in the order of `Tangents`."""
        return self.q, self.k, self.v, self.mask


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
    """out and out_lo (batch, seqlen_q, heads, head_dim_v), lse and lse_lo (batch, heads, seqlen_q).

    The low-order parts are what rounding took from out and lse.
    """

    out: Tensor
    lse: Tensor
    out_lo: Tensor | None
    lse_lo: Tensor | None


class JvpOutputs(NamedTuple):
    """The outputs, their tangents (mu is that of lse), and low-order parts of out, tout and lse."""

    out: Tensor
    lse: Tensor
    tout: Tensor
    mu: Tensor
    out_lo: Tensor | None
    tout_lo: Tensor | None
    lse_lo: Tensor | None


class Cotangents(NamedTuple):
    """Cotangents of the outputs of `forward`; None is zero."""

    out: Tensor | None = None
    lse: Tensor | None = None


class JvpCotangents(NamedTuple):
    """Cotangents of the outputs of `forward_jvp`; None is zero."""

    out: Tensor | None = None
    lse: Tensor | None = None
    tout: Tensor | None = None
    mu: Tensor | None = None


# Whether gradients of (q, k, v, mask) are needed, and for `jvp_backward` those of their tangents.
Needs = tuple[bool, ...]


class InputNeeds(NamedTuple):
    """Whether the gradient of each input, or of its tangent, is needed."""

    q: bool = False
    k: bool = False
    v: bool = False
    mask: bool = False


def split_needs(needs: Needs) -> tuple[InputNeeds, InputNeeds]:
    """The needs of the inputs and of their tangents."""
    count = len(InputNeeds._fields)
    return InputNeeds(*needs[:count]), InputNeeds(*needs[count:])


class AttentionBackend(Protocol):
    """What a backend implements. None stands for a tensor of zeros and is never materialised.

    lse, mu and their cotangents are float32 (float64 for float64 inputs); all other tensors have
    the inputs' dtype, except that a mask and its tangent may be float32 with half precision. Inputs
    are validated and never modified. A row that sees no key: out = tout = mu = 0, lse = −inf, and
    no gradient.
    """

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        """Return O, lse and the low-order parts of both."""

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """Return O, lse, tO, mu and the low-order parts of O, tO and lse."""

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> Gradients:
        """Return the gradients of the inputs."""

    def jvp_backward(
        self,
        inputs: Inputs,
        tangents: Tangents,
        outputs: JvpOutputs,
        cotangents: JvpCotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> tuple[Gradients, Gradients]:
        """Return the gradients of the inputs and of their tangents."""
