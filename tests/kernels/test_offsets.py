"""Offsets between rows that exceed 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.emulator import emulator
from tests.kernels import harness, kernel_case
from tests.kernels.buffers import Buffer, Layout
from tests.kernels.cases import FAMILIES, Family, axes_of


class FarRows(Buffer):
    """A tensor whose last row starts beyond 2^31 elements. Most of its memory is never touched."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, row_dim: int) -> None:
        stride = 2**31 // (shape[row_dim] - 1) // 8 * 8 + 8
        columns = shape[-1]
        heads = shape[3 - row_dim]
        strides = [heads * columns, columns, columns, 1]
        strides[row_dim] = stride
        self.view = torch.empty(stride * shape[row_dim], dtype=dtype).as_strided(shape, strides)

    def surroundings_are_untouched(self) -> bool:
        """Not checked: reading the surroundings would allocate them."""
        return True


def far_rows(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Buffer:
    """Instead of `buffers.matrix_buffer`."""
    del layout
    return FarRows(shape, dtype, row_dim=1)


def far_copy(x: Tensor, layout: Layout) -> Buffer:
    """Instead of `buffers.buffer_of`."""
    buffer = far_rows(tuple(x.shape), x.dtype, layout)
    buffer.view[...] = x
    return buffer


def far_mask(mask: Tensor, *, columns_first: bool) -> Buffer:
    """Instead of `harness.mask_buffer_of`."""
    del columns_first
    buffer = FarRows(tuple(mask.shape), mask.dtype, row_dim=2)
    buffer.view[...] = mask
    return buffer


def by_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each row as a buffer of its own, since the emulator keeps state for each byte of a buffer."""
    rows = {}
    for name, x in tensors.items():
        dim = max(range(x.ndim), key=x.stride)
        far_apart = x.stride(dim) * x.shape[dim] > 2**30
        parts = x.unbind(dim) if far_apart else [x]
        rows |= {f"{name} {i}": part for i, part in enumerate(parts)}
    return rows


def launching(
    machine: ModuleType, *, seed: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Instead of `emulator.launching`."""
    return emulator.launching(machine, seed=seed, inputs=by_rows(inputs), outputs=by_rows(outputs))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_offsets_have_64_bits(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(load=emulator.load, launching=launching)
    monkeypatch.setattr(harness, "emulator", machine)
    monkeypatch.setattr(harness, "matrix_buffer", far_rows)
    monkeypatch.setattr(harness, "mask_buffer_of", far_mask)
    monkeypatch.setattr(kernel_case, "buffer_of", far_copy)
    case = {name: values[0] for name, values in axes_of(family).items()}
    case |= {"queries": "tile + 1", "keys": "tile + 1", "heads": "4 over 2"}
    if family.masked:
        case |= {"mask dims": "hrc"}
    test = kernel_case.kernel_test(case)
    assert test.faults(test.run()) == []
