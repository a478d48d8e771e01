"""AdaLN: layer normalisation whose scale and shift depend on an embedding (DiT, 2212.09748).

    y = norm(h) ⊙ s + b                                  s = 1 + scale, b = shift
    y = norm(h) ⊙ pnorm(s) + pnorm(b)                    double normalisation (sCM, 2410.11081 §4.1)

pnorm divides by the root mean square over the features. The derivative of s and b with respect to
time grows with their size, and dF/dt with it; normalised, they cannot grow.
"""

import torch
from torch import Tensor, nn

from rcm.models.embeddings import zero_init
from rcm.norms import layer_norm

# b starts at 0, where pnorm has the slope eps^-½ and the third derivative -3 eps^-3/2 along b. The
# usual 1e-8 multiplies the first gradients by 10⁴, and the first step of Adam takes b from 0 to
# full size. With 1e-2 the slope is 10, all derivatives fit any dtype, and b of size 1 keeps 99.5 %
# of it.
PIXEL_NORM_EPS = 1e-2


class Modulation(nn.Module):
    """AdaLN-zero: embedding (batch, dim) -> `chunks` tensors (batch, 1, dim), initially zero."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = zero_init(nn.Linear(dim, chunks * dim))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(embedding))[:, None].chunk(self.chunks, dim=-1)


class AdaptiveLayerNorm(nn.Module):
    """h (batch, tokens, dim), shift and scale (batch, 1, dim) -> normalised and modulated h."""

    def __init__(self, *, double_norm: bool) -> None:
        super().__init__()
        self.double_norm = double_norm

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        scale = 1 + scale
        if self.double_norm:
            scale, shift = pixel_norm(scale), pixel_norm(shift)
        return torch.addcmul(shift, layer_norm(h, h.shape[-1:]), scale)


def pixel_norm(features: Tensor) -> Tensor:
    """features / sqrt(mean(features²) + eps) over the last dimension (1710.10196 §4.2)."""
    return nn.functional.rms_norm(features, features.shape[-1:], eps=PIXEL_NORM_EPS)
