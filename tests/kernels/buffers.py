"""Tensors in all memory layouts, surrounded by poison that kernels must neither read nor write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MARGIN = 64  # elements of poison before and after each tensor; a multiple of 16 bytes
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Layout:
    """The strides of a (batch, rows, heads, columns) tensor, whose columns are contiguous.

    Attributes:
        order: "b", "r" and "h" from the outermost to the innermost. A dimension that is left out is
            expanded: its stride is 0.
        column_gap: unused elements after the columns.
        gap: unused elements after each of the outer dimensions.
        offset: elements between a multiple of 16 bytes and the first element.
    """

    order: str = "brh"
    column_gap: int = 0
    gap: int = 0
    offset: int = 0

    @property
    def aligned(self) -> bool:
        """Whether all rows start at multiples of 16 bytes, if they have a multiple of 8 columns."""
        return not any(x % 8 for x in (self.column_gap, self.gap, self.offset))

    @property
    def expanded(self) -> str:
        """The dimensions of stride 0."""
        return "".join(d for d in "brh" if d not in self.order)

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """In elements, one for each dimension."""
        sizes = dict(zip("brh", shape, strict=False))
        stride = shape[3] + self.column_gap
        strides = dict.fromkeys("brh", 0)
        for dim in reversed(self.order):
            strides[dim] = stride
            stride = stride * sizes[dim] + self.gap
        return strides["b"], strides["r"], strides["h"], 1


LAYOUTS = {
    "dense": Layout(),
    "heads first": Layout("bhr"),
    "batch last": Layout("rhb"),
    "part of a larger tensor": Layout(column_gap=8, gap=24),
    # Layouts that do not allow loads of 16 bytes.
    "odd row stride": Layout("bhr", column_gap=3),
    "odd address": Layout(column_gap=8, offset=1),
    "4-byte address": Layout("bhr", offset=2, gap=2),
    "8-byte strides": Layout("bhr", column_gap=4),
}
EXPANDED_LAYOUTS = {
    "one head for all": Layout("br"),
    "one batch for all": Layout("rh"),
    "one row for all": Layout("bh"),
}


class Buffer:
    """A tensor and the memory around it, which is filled with NaN.

    Attributes:
        view: the tensor; NaN until something is written.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...], offset: int = 0
    ) -> None:
        # The last element's index; none where the tensor is empty.
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        self._bits = torch.full(
            (2 * _MARGIN + offset + max(last, 0) + 1,), -1, dtype=_BITS[dtype.itemsize]
        )
        self.view = self._bits.view(dtype).as_strided(shape, strides, _MARGIN + offset)

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.view.data_ptr()

    def surroundings_are_untouched(self) -> bool:
        """Whether the memory around the tensor holds nothing but poison."""
        outside = self._bits.clone()
        offset = self.view.storage_offset()
        outside.as_strided(self.view.shape, self.view.stride(), offset).fill_(-1)
        return bool((outside == -1).all())


def matrix_buffer(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Buffer:
    """A (batch, rows, heads, columns) tensor."""
    return Buffer(shape, dtype, layout.strides(shape), layout.offset)


def buffer_of(x: Tensor, layout: Layout) -> Buffer:
    """A copy of a (batch, rows, heads, columns) tensor; expanded dimensions repeat their first."""
    buffer = matrix_buffer(tuple(x.shape), x.dtype, layout)
    firsts = tuple(slice(0, 1) if d in layout.expanded else slice(None) for d in "brh")
    buffer.view[firsts] = x[firsts]
    return buffer
