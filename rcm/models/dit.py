"""A small diffusion transformer (DiT, 2212.09748) whose derivatives are smooth in time.

It is a TrigFlow network F = net(x, t, labels) or flow map F = net(x, t, labels, end=end) for
distillation: attention has a forward-mode derivative (jvp_attn), queries and keys are normalised,
and the embeddings of times use low frequencies. Options of DiTConfig add what sCM and iMF ask of a
network.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from jvp_attn import flash_attn_jvp
from rcm.guidance import GuidedCondition
from rcm.models.embeddings import (
    GuidanceEmbedding,
    LogWeight,
    TimeEmbedding,
    fourier_features,
    zero_init,
)
from rcm.models.model import ModelConfig
from rcm.models.modulation import AdaptiveLayerNorm, Modulation
from rcm.models.optional_parts import allow_absent
from rcm.trigflow import check_like, require_precise_time
from rcm.validation import require_choice, require_integer, require_number

MAX_DIM, MAX_DEPTH, MAX_PATCH, MAX_STD = 2**16, 1000, 1024, 100
Condition = Tensor | GuidedCondition
Features = Literal["positional", "fourier"]
FEATURES = get_args(Features)
Precision = Literal["float32", "bfloat16"]
PRECISIONS = get_args(Precision)
OPTIONAL_PARTS = {
    **dict.fromkeys(("end", "null_label", "guidance", "log_weight")),
    "velocity_out": "tokens_out",
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """The diffusion transformer (DiT)."""

    optional_parts = (
        *ModelConfig.optional_parts,
        *("learned_weight", "auxiliary_head", "precision"),
    )
    initial = ("label_std",)

    patch: int = 2
    """Pixels of a side of a token; must divide the side of an image."""
    dim: int = 64
    """Width of a token, a multiple of 4."""
    depth: int = 3
    """Number of blocks."""
    heads: int = 4
    """Number of attention heads; must divide the width."""
    double_norm: bool = False
    """Normalise the scale and the shift of AdaLN (sCM's adaptive double normalisation)."""
    time_embedding: Features = "positional"
    """Low frequencies, or random ones as in EDM, with which dF/dt is several times as large."""
    label_std: float = 0.02
    """Standard deviation of the first label embeddings."""
    learned_weight: bool = False
    """Add the adaptive weight w(t) of sCM, trained with the student."""
    auxiliary_head: bool = False
    """Add a second output, the velocity at (x, t), next to that of a flow map (iMF)."""
    precision: Precision = "float32"
    """Precision of matrix products and attention (torch.autocast); weights stay float32."""

    def __post_init__(self) -> None:
        require_integer(1, MAX_PATCH, patch=self.patch)
        _require_sizes(dim=self.dim, depth=self.depth, heads=self.heads)
        require_choice(FEATURES, time_embedding=self.time_embedding)
        require_number("[]", 0, MAX_STD, label_std=self.label_std)
        require_choice(PRECISIONS, precision=self.precision)

    def build(self, sample_shape: tuple[int, ...], classes: int) -> "DiT":
        channels, size, _ = sample_shape
        return DiT(size=size, channels=channels, classes=classes, **asdict(self))


class DiT(nn.Module):
    """net(x, t, labels, end=None) -> F like x.

    x is (batch, channels, size, size); t and end are (batch,), float32 or float64; labels (batch,)
    int64. The end of a flow map enters through an embedding of t - end; end=None adds nothing.

    The options are those of DiTConfig. With null_class the label `classes` means "no label". With
    guidance_input the condition may be a GuidedCondition of labels; labels alone add nothing. With
    learned_weight, log_weight(t) is w(t), (batch,) -> (batch,); otherwise it is None. With
    auxiliary_head, heads(x, t, labels, end=None) is (F, velocity at (x, t)), each like x, in one
    evaluation (iMF, 2512.02012); otherwise it is None. With precision "bfloat16", matrix products,
    attention and the tokens between them are bfloat16; weights, times and x are not.

    The end and each option but double_norm and time_embedding start without effect on F, draw
    their weights after those of the plain network, and may be absent from a state dict: a network
    of one time loads into a flow map, and computes the same F. The auxiliary head then starts as
    a copy of the output layer.

    The defaults, for 8×8 digits, have 250k parameters. Raises ValueError if patch does not divide
    size, heads or 4 does not divide dim, or a setting is out of range, for an x or end of another
    shape and for times below float32; TypeError for a number that is not an integer; IndexError for
    labels out of range.
    """

    null_label: nn.Parameter | None
    guidance: GuidanceEmbedding | None
    velocity_out: nn.Linear | None
    log_weight: LogWeight | None
    heads: Callable[..., tuple[Tensor, Tensor]] | None

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
        double_norm: bool = False,
        time_embedding: Features = "positional",
        label_std: float = 0.02,
        learned_weight: bool = False,
        null_class: bool = False,
        guidance_input: bool = False,
        auxiliary_head: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        require_integer(1, size=size, channels=channels, patch=patch, classes=classes)
        if size % patch:
            raise ValueError(f"patch is {patch}; it must divide {size}, the side of an image")
        _require_sizes(dim=dim, depth=depth, heads=heads)
        require_choice(FEATURES, time_embedding=time_embedding)
        require_number("[]", 0, MAX_STD, label_std=label_std)
        require_choice(PRECISIONS, precision=precision)
        self.size, self.channels, self.patch, self.precision = size, channels, patch, precision
        self.tokens_in = nn.Linear(channels * patch**2, dim)
        self.register_buffer("positions", _grid_positions(size // patch, dim), persistent=False)
        self.time = TimeEmbedding(dim)
        self.label = nn.Embedding(classes, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, double_norm=double_norm) for _ in range(depth)
        )
        self.norm = AdaptiveLayerNorm(double_norm=double_norm)
        self.modulation = Modulation(dim, 2)
        # F starts at 0, the mean of the velocity for normalised data.
        self.tokens_out = zero_init(nn.Linear(dim, channels * patch**2))
        nn.init.normal_(self.label.weight, std=label_std)

        # The rest is drawn last, so that the weights above depend only on the seed.
        self.end = TimeEmbedding(dim, zero=True)
        self.guidance = GuidanceEmbedding(dim) if guidance_input else None
        if time_embedding == "fourier":
            self.time.features = fourier_features(dim)
        self.null_label = nn.Parameter(torch.zeros(dim)) if null_class else None
        self.velocity_out = (
            zero_init(nn.Linear(dim, channels * patch**2)) if auxiliary_head else None
        )
        self.log_weight = LogWeight(dim) if learned_weight else None
        self.heads = self._heads if auxiliary_head else None
        allow_absent(self, OPTIONAL_PARTS)

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None = None
    ) -> Tensor:
        with self._autocast(x):
            image = self._image(self.tokens_out(self._tokens(x, t, condition, end)))
        return image.to(x.dtype)

    def _heads(
        self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert self.velocity_out is not None
        with self._autocast(x):
            h = self._tokens(x, t, condition, end)
            f, velocity = self._image(self.tokens_out(h)), self._image(self.velocity_out(h))
        return f.to(x.dtype), velocity.to(x.dtype)

    def _autocast(self, x: Tensor) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(x.device.type, torch.bfloat16)

    def _tokens(self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None) -> Tensor:
        """What the output layers read: (batch, tokens, dim)."""
        if x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.channels}, "
                f"{self.size}, {self.size})"
            )
        p = self.patch
        h = rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)
        # Under mixed precision the weights may have fewer bits than x and the positions.
        h = self.tokens_in(h.to(self.tokens_in.weight.dtype))
        h = h + self.positions.to(h.dtype)
        embedding = self._embedding(t, condition, end)
        for block in self.blocks:
            h = block(h, embedding)
        return self.norm(h, *self.modulation(embedding))

    def _embedding(self, t: Tensor, condition: Condition, end: Tensor | None) -> Tensor:
        labels = condition.condition if isinstance(condition, GuidedCondition) else condition
        embedding = self.time(t) + self._label(labels)
        if end is not None:
            check_like("end", end, "t", t)
            require_precise_time(end)
            embedding = embedding + self.end(t - end)
        if isinstance(condition, GuidedCondition):
            if self.guidance is None:
                raise ValueError(
                    "the condition is a GuidedCondition, but this network has no guidance input; "
                    "build it with guidance_input=True, or pass the labels alone"
                )
            scale, low, high = condition.scale, condition.low, condition.high
            for name, value in (("scale", scale), ("low", low), ("high", high)):
                check_like(name, value, "t", t)
            embedding = embedding + self.guidance(scale, low, high)
        return embedding

    def _label(self, labels: Tensor) -> Tensor:
        if self.null_label is None:
            return self.label(labels)
        table = torch.cat([self.label.weight, self.null_label[None]])
        return nn.functional.embedding(labels, table)

    def _image(self, tokens: Tensor) -> Tensor:
        p = self.patch
        return rearrange(tokens, "b (y x) (c p q) -> b c (y p) (x q)", y=self.size // p, p=p, q=p)


def _require_sizes(*, dim: int, depth: int, heads: int) -> None:
    require_integer(1, MAX_DIM, dim=dim)
    require_integer(1, MAX_DEPTH, depth=depth)
    require_integer(1, heads=heads)
    if dim % 4:
        raise ValueError(f"dim is {dim}; it must be a multiple of 4")
    if dim % heads:
        raise ValueError(f"heads is {heads}; it must divide dim, which is {dim}")


class Block(nn.Module):
    """Attention and MLP, each modulated by time and label: (batch, tokens, dim) -> the same."""

    def __init__(self, dim: int, heads: int, *, double_norm: bool) -> None:
        super().__init__()
        self.norm_attention = AdaptiveLayerNorm(double_norm=double_norm)
        self.attention = Attention(dim, heads)
        self.norm_mlp = AdaptiveLayerNorm(double_norm=double_norm)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = Modulation(dim, 6)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(embedding)
        h = torch.addcmul(h, gate_a, self.attention(self.norm_attention(h, shift_a, scale_a)))
        return torch.addcmul(h, gate_m, self.mlp(self.norm_mlp(h, shift_m, scale_m)))


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
        query, key = _rms_norm(self.norm_query, query), _rms_norm(self.norm_key, key)
        attended = flash_attn_jvp(query, key, value)
        return self.out(rearrange(attended, "b n h d -> b n (h d)"))


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """norm(x), in the dtype of x even if the weight has more bits, as under autocast."""
    assert norm.weight is not None
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def _grid_positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side×side grid: (side², dim)."""
    frequencies = torch.logspace(0, -1, dim // 4)
    angle = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side**2, dim)
