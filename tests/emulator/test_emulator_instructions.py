"""Each emulated instruction computes what the GPU's does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.emulator.probe_kernels import run_instruction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
each_element = pytest.mark.parametrize("element", DTYPES)


def all_elements(element: str) -> NDArray[np.float32]:
    """The value of every bit pattern."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return patterns.view(DTYPES[element]).float().numpy()


def random_elements(element: str, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DTYPES[element])


def bits_of(x: torch.Tensor) -> NDArray[np.uint16]:
    return x.view(torch.int16).numpy().view(np.uint16)


@each_element
def test_unpack_is_exact_for_every_bit_pattern(element: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = run_instruction(f"unpack_{element}", patterns, (1 << 16,), np.float32, count=1 << 16)
    np.testing.assert_array_equal(values, all_elements(element))
    np.testing.assert_array_equal(np.signbit(values), patterns >> 15 == 1)


@each_element
def test_pack_rounds_to_nearest_even_around_every_element(element: str) -> None:
    elements = all_elements(element)
    finite = np.sort(elements[np.isfinite(elements)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    largest = finite[-1].astype(np.float64)
    beyond = np.array([largest * f for f in (1 + 2**-13, 1 + 2**-12, 1 + 2**-9, 1 + 2**-8.5)])
    beyond = beyond[beyond < np.finfo(np.float32).max].astype(np.float32)
    special = np.array([0, np.inf, 1e-45, 1e-40, np.finfo(np.float32).max], np.float32)
    points = np.concatenate([elements[~np.isnan(elements)], middles, beyond, special, -beyond])
    with np.errstate(over="ignore"):
        up, down = (np.nextafter(points, np.float32(s * np.inf)) for s in (1, -1))
    x = np.concatenate([points, up, down, -special, special[:1]])
    x = x[: x.size // 2 * 2]

    packed = run_instruction(f"pack_{element}", x, (x.size,), np.uint16, count=x.size)
    np.testing.assert_array_equal(packed, bits_of(torch.from_numpy(x).to(DTYPES[element])))


@each_element
def test_pack_maps_every_nan_to_one(element: str) -> None:
    nans = np.array([0x7F800001, 0x7FC00000, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    packed = run_instruction(f"pack_{element}", nans, (4,), np.uint16, count=4)
    assert (packed == 0x7FFF).all()


def test_fast_exp2_flushes_subnormal_results_to_zero() -> None:
    x = np.linspace(-160, 130, 2000, dtype=np.float32)
    x = np.concatenate([x, np.array([0, -126, -126.001, 1e-45, -np.inf, np.inf], np.float32)])
    y = run_instruction("fast_exp2", x, x.shape, np.float32, count=x.size)
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    expected[expected < np.finfo(np.float32).tiny] = 0
    np.testing.assert_array_max_ulp(y, expected, maxulp=2)


def test_shuffle_xor_swaps_lanes() -> None:
    lanes = np.arange(32)
    result = run_instruction("shuffle_xor", lanes.astype(np.float32), (32, 32), np.float32)
    np.testing.assert_array_equal(result, lanes[:, None] ^ lanes)


def test_any_combines_all_threads_of_the_warp_or_the_block() -> None:
    conditions = np.zeros((67, 64), np.float32)  # none, all, only the first warp, one thread each
    conditions[1] = 1
    conditions[2, :32] = 1
    conditions[3:] = np.eye(64)
    of_warp, of_block = run_instruction("any", conditions, (2, 67, 64), np.float32, count=67)
    expected = conditions.reshape(67, 2, 32).any(-1).repeat(32, axis=-1)
    np.testing.assert_array_equal(of_warp, expected)
    np.testing.assert_array_equal(of_block, conditions.any(-1, keepdims=True).repeat(64, axis=-1))


def test_copy_async_fills_the_rest_with_zeros() -> None:
    source = np.arange(1, 17 * 16 + 1, dtype=np.uint16).astype(np.uint8).reshape(17, 16) | 1
    copied = run_instruction("copy_async", source, (17, 16), np.uint8)
    expected = np.where(np.arange(16) < np.arange(17)[:, None], source, 0)
    np.testing.assert_array_equal(copied, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_distributes_elements_to_lanes(transposed: bool) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    name = "load_matrices_transposed" if transposed else "load_matrices"
    registers = run_instruction(name, matrices, (32, 4, 2), np.uint16)
    # Lane 4g + t holds (g, 2t) and (g, 2t + 1) of each matrix.
    seen = matrices.transpose(0, 2, 1) if transposed else matrices
    expected = seen.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4, 2)
    np.testing.assert_array_equal(registers, expected)


@each_element
def test_multiply_add_is_a_matrix_product(element: str) -> None:
    a = random_elements(element, 16, 16, seed=0)
    b = random_elements(element, 16, 8, seed=1)
    c = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    x = np.concatenate([bits_of(a).ravel(), bits_of(b).ravel(), c.numpy().view(np.uint16).ravel()])
    result = run_instruction(f"multiply_add_{element}", x, (16, 8), np.float32)
    expected = (a.double() @ b.double() + c.double()).numpy()
    np.testing.assert_allclose(result, expected, rtol=0, atol=16 * 2**-23)
