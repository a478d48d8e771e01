"""A small diffusion transformer (DiT, 2212.09748) whose derivatives are smooth in time.

It is a TrigFlow network F = net(x, t, labels) for consistency distillation: attention has a
forward-mode derivative (jvp_attn), queries and keys are normalised, and the time embedding uses
low frequencies. The loss contains dF/dt, and a frequency ω in the embedding multiplies dF/dt by ω.
Fourier features with frequencies in the hundreds are harmless in a teacher, but they make dF/dt
explode (sCM, 2410.11081 §4.1).
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from jvp_attn import flash_attn_jvp
from rcm.models.embeddings import TimeEmbedding
from rcm.models.model import ModelConfig
from rcm.trigflow import check_like, require_precise_time
from rcm.validation import require_integer

MAX_DIM, MAX_DEPTH = 2**16, 1000


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """The diffusion transformer (DiT)."""

    dim: int = 64
    """Width of a token, a multiple of 4."""
    depth: int = 3
    """Number of blocks."""
    heads: int = 4
    """Number of attention heads; must divide the width."""

    def __post_init__(self) -> None:
        _require_sizes(dim=self.dim, depth=self.depth, heads=self.heads)

    def build(self, sample_shape: tuple[int, ...], classes: int) -> "DiT":
        channels, size, _ = sample_shape
        return DiT(
            size=size,
            channels=channels,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            classes=classes,
        )


class DiT(nn.Module):
    """net(x, t, labels, end=None) -> F like x.

    x is (batch, channels, size, size); t and end are (batch,), float32 or float64; labels (batch,)
    int64. F of a flow map depends on its end through an embedding of t - end, which starts at zero;
    end=None adds nothing.

    With null_class=True the label `classes` means "no label", for classifier-free guidance. The
    defaults, for 8×8 digits, have 250k parameters. Raises ValueError if patch does not divide size,
    heads or 4 does not divide dim, or a number is out of range, for an x or end of another shape
    and for times below float32; TypeError for a number that is not an integer; IndexError for
    labels out of range.
    """

    def __init__(
        self,
        *,
        size: int = 8,
        channels: int = 1,
        patch: int = 2,
        dim: int = 64,
        depth: int = 3,
        heads: int = 4,
        classes: int = 10,
        null_class: bool = False,
    ) -> None:
        super().__init__()
        require_integer(1, size=size, channels=channels, patch=patch, classes=classes)
        if size % patch:
            raise ValueError(f"patch is {patch}; it must divide size, which is {size}")
        _require_sizes(dim=dim, depth=depth, heads=heads)
        self.size, self.channels, self.patch = size, channels, patch
        self.tokens_in = nn.Linear(channels * patch**2, dim)
        self.register_buffer("positions", _grid_positions(size // patch, dim), persistent=False)
        self.time = TimeEmbedding(dim)
        self.label = nn.Embedding(classes + null_class, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = Modulation(dim, 2)
        self.tokens_out = nn.Linear(dim, channels * patch**2)
        nn.init.normal_(self.label.weight, std=0.02)
        # F starts at 0, the mean of the velocity for normalised data.
        nn.init.zeros_(self.tokens_out.weight)
        nn.init.zeros_(self.tokens_out.bias)
        # Drawn last, so that the weights above do not depend on it.
        self.end = TimeEmbedding(dim)
        self.end.zero_output()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, end: Tensor | None = None) -> Tensor:
        if x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.channels}, "
                f"{self.size}, {self.size})"
            )
        p = self.patch
        h = rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        h = self.tokens_in(h) + self.positions
        embedding = self.time(t) + self.label(condition)
        if end is not None:
            check_like("end", end, "t", t)
            require_precise_time(end)
            embedding = embedding + self.end(t - end)
        for block in self.blocks:
            h = block(h, embedding)
        shift, scale = self.modulation(embedding)
        f = self.tokens_out(self.norm(h) * (1 + scale) + shift)
        return rearrange(f, "b (y x) (c p q) -> b c (y p) (x q)", y=self.size // p, p=p, q=p)


def _require_sizes(*, dim: int, depth: int, heads: int) -> None:
    require_integer(1, MAX_DIM, dim=dim)
    require_integer(1, MAX_DEPTH, depth=depth)
    require_integer(1, heads=heads)
    if dim % 4:
        raise ValueError(f"dim is {dim}; it must be a multiple of 4")
    if dim % heads:
        raise ValueError(f"heads is {heads}; it must divide dim, which is {dim}")


class Modulation(nn.Module):
    """AdaLN-zero: embedding (batch, dim) -> `chunks` tensors (batch, 1, dim), initially zero."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(dim, chunks * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(embedding))[:, None].chunk(self.chunks, dim=-1)


class Block(nn.Module):
    """Attention and MLP, each modulated by time and label: (batch, tokens, dim) -> the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = Modulation(dim, 6)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(embedding)
        h = h + gate_a * self.attention(self.norm_attention(h) * (1 + scale_a) + shift_a)
        return h + gate_m * self.mlp(self.norm_mlp(h) * (1 + scale_m) + shift_m)


class Attention(nn.Module):
    """Multi-head self-attention; normalised queries and keys bound the logits and dF/dt."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_query = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_key = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = rearrange(
            self.qkv(h), "b n (three h d) -> three b n h d", three=3, h=self.heads
        )
        attended = flash_attn_jvp(self.norm_query(query), self.norm_key(key), value)
        return self.out(rearrange(attended, "b n h d -> b n (h d)"))


def _grid_positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side×side grid: (side², dim)."""
    frequencies = torch.logspace(0, -1, dim // 4)
    angle = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side**2, dim)
