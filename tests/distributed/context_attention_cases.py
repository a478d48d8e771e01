"""Attention over the tokens of several ranks, and the same attention in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.func import jvp

from jvp_attn import flash_attn_jvp
from rcm.distributed.context_attention import context_attention
from rcm.distributed.token_split import TokenSplit

RANKS = 2
NAMES = ("q", "k", "v", "q tangent", "k tangent", "v tangent")
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Self-attention among the tokens of one or more sequences, each of which is split."""

    way: str
    lengths: tuple[int, ...]
    heads: int
    heads_k: int
    dtype: torch.dtype = torch.float64
    has_means: bool = False
    """Whether keys, their tangents and values have a mean, as in trained networks."""

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        means = ", with means" if self.has_means else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.way}, {lengths} tokens, {self.heads}/{self.heads_k} heads, {dtype}{means}"


WAYS = ("ulysses", "ring")
CASES = [
    Case(way, lengths, heads, heads_k)
    for way in WAYS
    for lengths, heads, heads_k in [
        ((45,), 3, 3),
        ((15, 7), 4, 2),
        ((1,), 2, 2),  # one rank has only padding
    ]
]
HALF = [Case(way, (45,), 3, 3, torch.bfloat16, means) for way in WAYS for means in (False, True)]


def inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents, float64, and weights of a loss of out and its tangent."""
    generator = torch.Generator().manual_seed(0)
    n = sum(case.lengths)
    heads = [case.heads, case.heads_k, case.heads_k] * 2 + [case.heads] * 2
    means = [0, 5, 3, 0, 5, 0, 0, 0] if case.has_means else [0] * 8
    xs = [
        torch.randn(2, n, h, 8, generator=generator, dtype=torch.float64) + mean
        for h, mean in zip(heads, means, strict=True)
    ]
    return [x.to(case.dtype).double() for x in xs[:6]], xs[6:]


def outcome(
    attention: Callable[..., Tensor], tensors: list[Tensor], weights: list[Tensor]
) -> Named:
    """Output, tangent, and the gradients of the weighted sum of both."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    out, tangent = jvp(attention, tuple(tensors[:3]), tuple(tensors[3:]))
    ((out * weights[0]).sum() + (tangent * weights[1]).sum()).backward()
    gradients = {f"gradient of {name}": x.grad for name, x in zip(NAMES, tensors, strict=True)}
    found = {"out": out.detach(), "tangent": tangent.detach(), **gradients}
    return {name: y.double() for name, y in found.items()}


def in_one_process(case: Case, dtype: torch.dtype) -> Named:
    tensors, weights = inputs(case)
    return outcome(flash_attn_jvp, [x.to(dtype) for x in tensors], [w.to(dtype) for w in weights])


def own(x: Tensor, case: Case, split: TokenSplit) -> Tensor:
    """This rank's shares of the sequences of x, (batch, seqlen, ...), one after the other."""
    return torch.cat([split.own(part, 1) for part in x.split(case.lengths, 1)], 1)


def on_rank(case: Case, rank: int, alone: ProcessGroup) -> Named:
    """This rank's results; those of padded queries are zero."""
    world = dist.group.WORLD
    assert world is not None
    split = TokenSplit(RANKS, rank)
    tensors, weights = ([own(x, case, split) for x in xs] for xs in inputs(case))
    is_token = own(torch.ones_like(inputs(case)[1][0]), case, split)[:, :, :1, :1] > 0
    for i in (1, 2, 4, 5):  # keys, values and their tangents
        tensors[i] = torch.where(is_token, tensors[i], torch.nan)
    shares = [split.share(n) for n in case.lengths]
    chunks = [[0], [1]] if case.way == "ring" else [[0, 1]]
    attention = partial(
        context_attention,
        ring=world if case.way == "ring" else alone,
        ulysses=world if case.way == "ulysses" else alone,
        tokens=[split.tokens(shares, ranks) for ranks in chunks],
    )
    dtype = case.dtype
    found = outcome(attention, [x.to(dtype) for x in tensors], [w.to(dtype) for w in weights])
    for name in ("out", "tangent"):
        found[name] = torch.where(is_token, found[name], 0)
    return found


def outcomes(rank: int) -> dict[str, Named]:
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    return {str(case): on_rank(case, rank, alone) for case in CASES + HALF}
