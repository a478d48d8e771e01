"""Buffers have the strides and the poison that the kernel tests rely on."""

import pytest
import torch

from tests.kernels.buffers import EXPANDED_LAYOUTS, LAYOUTS, Buffer, buffer_of, matrix_buffer

SHAPE = (2, 5, 3, 16)
BF16 = torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_layout_stores_each_element_and_is_surrounded_by_poison(layout) -> None:
    buffer = matrix_buffer(SHAPE, BF16, layout)
    assert buffer.view.isnan().all()
    assert buffer.view.stride(3) == 1
    values = torch.arange(480).reshape(SHAPE)
    buffer.view[...] = values % 256
    assert torch.equal(buffer.view.long(), values % 256)
    assert buffer.surroundings_are_untouched()


@pytest.mark.parametrize("layout", EXPANDED_LAYOUTS.values(), ids=EXPANDED_LAYOUTS.keys())
def test_an_expanded_dimension_repeats_its_first_entry(layout) -> None:
    x = torch.randn(SHAPE).to(BF16)
    view = buffer_of(x, layout).view
    (dim,) = ("brh".index(d) for d in layout.expanded)
    assert view.stride(dim) == 0
    assert torch.equal(view, x.narrow(dim, 0, 1).expand(SHAPE))


def test_layouts_differ_in_the_widest_load_they_allow() -> None:
    def widest(buffer: Buffer) -> int:
        row = buffer.view.stride(1) * 2
        return next(n for n in (16, 8, 4, 2) if (buffer.address | row) % n == 0)

    by_layout = {name: widest(matrix_buffer(SHAPE, BF16, x)) for name, x in LAYOUTS.items()}
    assert by_layout == {
        "dense": 16,
        "heads first": 16,
        "batch last": 16,
        "part of a larger tensor": 16,
        "odd row stride": 2,
        "odd address": 2,
        "4-byte address": 4,
        "8-byte strides": 8,
    }


@pytest.mark.parametrize("distance", [-1, 16, 18])
def test_a_write_outside_the_tensor_is_detected(distance: int) -> None:
    buffer = matrix_buffer(SHAPE, BF16, LAYOUTS["odd row stride"])
    start = buffer.view.storage_offset()
    buffer.view.as_strided((1,), (1,), start + distance).fill_(0)
    assert not buffer.surroundings_are_untouched()
