"""The memory layout of dq_accum and ds_row_sums, as csrc/common/dq_accum.cuh describes it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from tests.kernels.buffers import Buffer
from tests.kernels.reference import Problem

ACCUMULATORS = ("dq_accum", "ds_row_sums")  # dS K, and dS summed along its rows

_ROW_MULTIPLE = 128


def zeros(problem: Problem, shape: tuple[int, ...]) -> dict[str, Buffer]:
    """Accumulators that are 0, for queries (batch, seqlen_q, heads, head_dim)."""
    batch, _, heads, head_dim = shape
    rows = _padded_rows(problem, shape)
    blocks = -(-head_dim // 8)
    return {
        name: _zeros(batch, heads, rows * numbers)
        for name, numbers in zip(ACCUMULATORS, (8 * blocks, 1), strict=True)
    }


def accumulators_of(problem: Problem, products: Tensor, totals: Tensor) -> dict[str, Buffer]:
    """Accumulators that hold products (batch, seqlen_q, heads, head_dim) and the sums of rows.

    totals: (batch, heads, seqlen_q).
    """
    batch, _, heads, head_dim = products.shape
    buffers = zeros(problem, tuple(products.shape))
    blocks = -(-head_dim // 8)
    padded = torch.zeros(batch, heads, _padded_rows(problem, products.shape), 8 * blocks)
    for rows, start in _places(problem, products.shape):
        place = slice(start, start + rows.stop - rows.start)
        padded[:, :, place, :head_dim] = products[:, rows].transpose(1, 2).float()
        buffers["ds_row_sums"].view[..., place] = totals[..., rows].float()
    # Row 8 h + g of 16 and column 2 t + s of 8 are number 2 h + s of lane 4 g + t.
    fragments = padded.view(batch, heads, -1, 2, 8, blocks, 4, 2).permute(0, 1, 2, 5, 4, 6, 3, 7)
    buffers["dq_accum"].view[...] = fragments.reshape(batch, heads, -1)
    return buffers


def _zeros(batch: int, heads: int, numbers: int) -> Buffer:
    shape = (batch, heads, numbers)
    buffer = Buffer(shape, torch.float32, (heads * (numbers + 4) + 8, numbers + 4, 1))
    buffer.view.zero_()
    return buffer


def _padded_rows(problem: Problem, shape: tuple[int, ...]) -> int:
    if problem.cu_seqlens_q is None:
        return -(-shape[1] // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return (shape[1] // _ROW_MULTIPLE + len(problem.cu_seqlens_q) - 1) * _ROW_MULTIPLE


def _places(problem: Problem, shape: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """The rows of each sequence, and where they start in the accumulators."""
    starts = problem.cu_seqlens_q
    if starts is None:
        yield slice(0, shape[1]), 0
        return
    for i, (start, end) in enumerate(pairwise(starts)):
        yield slice(start, end), (start // _ROW_MULTIPLE + i) * _ROW_MULTIPLE
