"""Random numbers and memory layouts for the fuzzer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

# ----------------------------------------------------------------------------
# Numbers, drawn in float64; the caller rounds them to a dtype


class Numbers:
    """Random numbers of several kinds, within the range of a dtype."""

    def __init__(self, rng: Random, dtype: torch.dtype) -> None:
        self._rng = rng
        self._limits = torch.finfo(dtype)
        self._generator = torch.Generator().manual_seed(rng.getrandbits(32))
        self.dtype = dtype

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def offset(self, shape: tuple[int, ...]) -> Tensor:
        return self.normal(shape) + self._rng.choice([3, 5, -5])

    def integers(self, shape: tuple[int, ...]) -> Tensor:
        """Their products are exact, and often tie."""
        largest = self._rng.choice([1, 2, 8])
        return torch.randint(-largest, largest + 1, shape, generator=self._generator).double()

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def equal_rows(self, shape: tuple[int, ...]) -> Tensor:
        """All rows of one example are equal: their scores tie."""
        x = self.normal(shape)
        return x if x.ndim < 2 or x.numel() == 0 else x[..., :1, :].expand(shape).clone()

    def some_large_rows(self, shape: tuple[int, ...]) -> Tensor:
        return self.with_large_rows(shape, self._rng.choice([30, 1e3, 1e4, 1e6, 1e8, 1e30]))

    def some_larger_rows(self, shape: tuple[int, ...]) -> Tensor:
        return self.with_large_rows(shape, self._rng.choice([30, 1e3, 1e4, 1e6, 1e8]))

    def with_large_rows(self, shape: tuple[int, ...], factor: float) -> Tensor:
        x = self.normal(shape) if self._rng.random() < 0.5 else self.integers(shape)
        rows = self.uniform((*shape[:-1], 1)[: len(shape)]) < 0.2
        return self.clamped(torch.where(rows, x * factor, x))

    def large(self, shape: tuple[int, ...]) -> Tensor:
        return self.clamped(self.normal(shape) * self._rng.choice([30, 1e3, 1e4, 1e6, 1e8]))

    def near_the_maximum(self, shape: tuple[int, ...]) -> Tensor:
        return (0.3 + 0.69 * self.uniform(shape)) * self.signs(shape) * self._limits.max

    def near_the_fourth_root_of_the_maximum(self, shape: tuple[int, ...]) -> Tensor:
        """Products of three of them do not overflow, nor do sums of such products."""
        return self.normal(shape) * self._limits.max**0.25

    def near_the_minimum(self, shape: tuple[int, ...]) -> Tensor:
        return self.normal(shape) * self._limits.tiny * 4

    def subnormal(self, shape: tuple[int, ...]) -> Tensor:
        return self.uniform(shape) * self.signs(shape) * self._limits.tiny

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        return (self.uniform(shape) < 0.5).double() * 2 - 1

    def clamped(self, x: Tensor) -> Tensor:
        return x.clamp(self._limits.min, self._limits.max)

    def score_factor(self, shape: tuple[int, ...], ordinary: float) -> Tensor:
        """Numbers for q or k, ordinary ones with this probability."""
        kinds = (self.equal_rows, self.some_large_rows, self.some_large_rows)
        return self._of_kind(shape, ordinary, *kinds, self.near_the_fourth_root_of_the_maximum)

    def value(self, shape: tuple[int, ...], ordinary: float, *, may_overflow: bool) -> Tensor:
        """Numbers for v, ordinary ones with this probability.

        With `may_overflow` their products with cotangents may.
        """
        large = self.near_the_maximum if may_overflow else self.near_the_fourth_root_of_the_maximum
        return self._of_kind(shape, ordinary, self.equal_rows, self.some_large_rows, large)

    def direction(self, shape: tuple[int, ...], ordinary: float) -> Tensor:
        """Numbers for a tangent or cotangent, ordinary ones with this probability.

        They are multiplied with each other, and overflow in a different place in each order.
        """
        kinds = (self.some_larger_rows, self.near_the_fourth_root_of_the_maximum)
        return self._of_kind(shape, ordinary, *kinds)

    def _of_kind(
        self,
        shape: tuple[int, ...],
        ordinary: float,
        *others: Callable[[tuple[int, ...]], Tensor],
    ) -> Tensor:
        if self._rng.random() < ordinary:
            return self._rng.choice([self.normal, self.normal, self.offset, self.integers])(shape)
        small = (self.zeros, self.near_the_minimum, self.subnormal)
        return self._rng.choice([*others, *others, self.large, *small])(shape)


# ----------------------------------------------------------------------------
# Layouts


@dataclass(frozen=True)
class Layout:
    """How the numbers of a tensor lie in memory.

    Attributes:
        order: the dimensions, the slowest first.
        expanded: the dimensions of stride 0: all numbers along them are the same.
        stepped: the dimension of which memory holds twice as many, every other unused; or None.
        offset: how many unused numbers precede.
        odd_strides: whether dimensions of size 1 get meaningless strides.
    """

    order: tuple[int, ...]
    expanded: tuple[int, ...] = ()
    stepped: int | None = None
    offset: int = 0
    odd_strides: bool = False

    def shared(self, x: Tensor) -> Tensor:
        """x with the same numbers along the expanded dimensions."""
        for dim in self.expanded:
            if x.shape[dim] > 0:
                x = x.narrow(dim, 0, 1).expand(x.shape)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """A copy in this layout of an x that is `shared`. What is unused is NaN."""
        shape = x.shape
        for dim in self.expanded:
            if x.shape[dim] > 0:
                x = x.narrow(dim, 0, 1)
        sizes = [x.shape[dim] for dim in self.order]
        room = [
            2 * n if dim == self.stepped else n for dim, n in zip(self.order, sizes, strict=True)
        ]
        unused = 1 if not x.is_floating_point() else torch.nan
        memory = torch.full((self.offset + math.prod(room),), unused, dtype=x.dtype)
        view = memory[self.offset :].view(room)
        for i, dim in enumerate(self.order):
            if dim == self.stepped:
                view = view.unflatten(i, (sizes[i], 2)).select(i + 1, 0)
        view.copy_(x.permute(self.order))
        y = view.permute([self.order.index(dim) for dim in range(x.ndim)]).expand(shape)
        if self.odd_strides and y.numel() > 0:
            strides = [7 if n == 1 else s for n, s in zip(y.shape, y.stride(), strict=True)]
            y = y.as_strided(y.shape, strides)
        return y


def random_layout(rng: Random, rank: int, may_expand: bool = True) -> Layout:
    order = [*range(rank)]
    if rng.random() < 0.5:
        rng.shuffle(order)
    elif rank >= 3 and rng.random() < 0.5:
        order[-3], order[-2] = order[-2], order[-3]
    expanded: tuple[int, ...] = ()
    if may_expand and rank and rng.random() < 0.12:
        expanded = tuple(sorted(rng.sample(range(rank), rng.choice([1, 1, min(2, rank), rank]))))
    stepped = rng.randrange(rank) if rank and rng.random() < 0.15 else None
    return Layout(tuple(order), expanded, stepped, rng.choice([0, 0, 1, 5, 16]), rng.random() < 0.2)
