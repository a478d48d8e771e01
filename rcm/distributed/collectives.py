"""Collectives with every derivative: torch.func.jvp, dual numbers, gradients, double backward.

torch's own collectives drop tangents, most of them without an error. A collective is a linear map y
= C(x) of the tensors of all ranks, so that

    y_tangent = C(x_tangent)        x_grad = Cᵀ(y_grad)

One autograd.Function serves every collective that knows its transpose. Tensors and their tangents
travel together, in one message.

All ranks of a group must call the same collectives in the same order, on tensors of the same shapes
of which the same ones have tangents and require grad. They do if all ranks run the same program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class LinearCollective(Protocol):
    """A linear map of the tensors of all ranks of a group."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The map of each tensor, in one message and without derivatives."""

    @property
    def transpose(self) -> LinearCollective: ...


def apply_collective(collective: LinearCollective, *tensors: Tensor) -> list[Tensor]:
    """The collective of each tensor, with all of its derivatives, in one message.

    Args:
        collective: what to do.
        tensors: floating point, of one dtype and on one device; the shapes may differ. Some may
            have tangents; the message contains the tangents that there are.

    Raises:
        TypeError: the dtypes differ.
        ValueError: a shape does not fit the collective.
    """
    if len({x.dtype for x in tensors}) > 1:
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise TypeError(f"tensors of one message must have one dtype, got {dtypes}")
    duals = [fwAD.unpack_dual(x) for x in tensors]
    moving = [i for i, dual in enumerate(duals) if dual.tangent is not None]
    tangents = [duals[i].tangent for i in moving]
    results = list(_Linear.apply(collective, *(dual.primal for dual in duals), *tangents))
    for i, tangent in zip(moving, results[len(tensors) :], strict=True):
        results[i] = fwAD.make_dual(results[i], tangent)
    return results[: len(tensors)]


class _Linear(torch.autograd.Function):
    """(collective, *tensors) → its map of the tensors."""

    @staticmethod
    def forward(collective: LinearCollective, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(collective(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.collective = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Linear.apply(ctx.collective.transpose, *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Any:
        # The backward pass inside of a jvp comes here; `apply_collective` takes duals apart.
        return _Linear.apply(ctx.collective, *tangents)


# ----------------------------------------------------------------------------
# The collectives


@dataclass(frozen=True)
class AllToAll:
    """Each rank sends its i-th piece to rank i, and joins what it receives.

    A tensor (..., split, ..., join, ...) becomes (..., split / ranks, ..., join · ranks, ...).
    """

    group: ProcessGroup
    split: int
    """The dimension, from the front, that is cut into one piece per rank."""
    join: int
    """The dimension along which the pieces of all ranks are joined, in the order of the ranks."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ranks = self.group.size()
        pieces = []
        for x in tensors:
            if x.shape[self.split] % ranks:
                raise ValueError(
                    f"dimension {self.split} of a tensor of shape {tuple(x.shape)} must be a "
                    f"multiple of the {ranks} ranks that share it"
                )
            sizes = (ranks, x.shape[self.split] // ranks)
            pieces.append(x.unflatten(self.split, sizes).movedim(self.split, 0))
        sent = pieces[0].new_empty(ranks, sum(p[0].numel() for p in pieces))
        for piece, buffer in zip(pieces, _views(sent, pieces), strict=True):
            buffer.copy_(piece)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return [torch.cat(x.unbind(0), self.join) for x in _views(received, pieces)]

    @property
    def transpose(self) -> AllToAll:
        return AllToAll(self.group, split=self.join, join=self.split)


@dataclass(frozen=True)
class Shift:
    """Each rank sends its tensors to rank + by, and receives those of rank − by, in a ring."""

    group: ProcessGroup
    by: int = 1

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ranks, rank = self.group.size(), self.group.rank()
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        to, source = (rank + self.by) % ranks, (rank - self.by) % ranks
        messages = [
            *(dist.P2POp(dist.isend, x, group=self.group, group_peer=to) for x in sent),
            *(dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for x in received),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        return received

    @property
    def transpose(self) -> Shift:
        return Shift(self.group, -self.by)


@dataclass(frozen=True)
class AllGather:
    """The tensors of all ranks, joined along `dim`, on every rank.

    For results from which all ranks compute the same loss, which counts once: every rank then has
    the same gradient, and the transpose takes the rank's own part of it.
    """

    group: ProcessGroup
    dim: int

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ranks = self.group.size()
        sent = torch.cat([x.reshape(-1) for x in tensors])
        received = sent.new_empty(ranks * sent.numel())
        dist.all_gather_single(received, sent, group=self.group)
        shapes = [x.expand(ranks, *x.shape) for x in tensors]
        views = _views(received.view(ranks, -1), shapes)
        return [torch.cat(x.unbind(0), self.dim) for x in views]

    @property
    def transpose(self) -> OwnPart:
        return OwnPart(self.group, self.dim)


@dataclass(frozen=True)
class OwnPart:
    """The rank's own part, along `dim`, of tensors that all ranks have. It sends no message."""

    group: ProcessGroup
    dim: int

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ranks, rank = self.group.size(), self.group.rank()
        return [x.chunk(ranks, self.dim)[rank].clone() for x in tensors]

    @property
    def transpose(self) -> AllGather:
        return AllGather(self.group, self.dim)


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer (ranks, size), with the shapes (ranks, ...) of other tensors."""
    parts = buffer.split([x[0].numel() for x in like], 1)
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
