"""The inputs and expected outputs of the kernels of conformance_sm90.cu, in NumPy."""

from __future__ import annotations

import re

import numpy as np

from tests.gpu.conformance import (
    BEFORE,
    RANDOM,
    ROOT,
    Array,
    Probe,
    bits_of,
    random_bytes,
    values_of,
)

BOX_ROWS = 24
BOX_COLUMNS = 64


def identities() -> Probe:
    thread = np.arange(256)
    ones, zeros = np.ones_like(thread), np.zeros_like(thread)
    expected = np.stack([thread // 128, thread, ones, zeros], 1).astype(np.uint32)
    return Probe("identities", np.zeros(1, np.uint32), expected)


def share_registers() -> Probe:
    return Probe("share_registers", np.zeros(1, np.uint32), np.arange(384, dtype=np.float32) // 128)


def advice() -> Probe:
    x = np.linspace(-1e30, 1e30, 64, dtype=np.float32)
    thread = np.arange(64)
    return Probe("advice", x, np.stack([thread // 32 * 1024, thread * 4], 1).astype(np.uint32))


def reverse_in_warp() -> Probe:
    x = RANDOM.standard_normal(64).astype(np.float32)
    return Probe("reverse_in_warp", x, x.reshape(2, 32)[:, ::-1].ravel())


def reverse_by_named_barriers() -> Probe:
    x = RANDOM.standard_normal(64).astype(np.float32)
    return Probe("reverse_by_named_barriers", x, x[::-1].copy())


def reverse_by_mbarriers() -> Probe:
    x = RANDOM.standard_normal(64).astype(np.float32)
    times = np.arange(1, 4, dtype=np.float32)[:, None]
    return Probe("reverse_by_mbarriers", x, times * x[::-1])


def add_to_global() -> Probe:
    """The initial value and all summands are multiples of 16, so that no partial sum is rounded."""
    x = 16 * RANDOM.integers(-1000, 1001, (8, 128)).astype(np.float32)
    before = np.full(4, BEFORE, np.uint8).view(np.float32)
    sums = np.concatenate([x.sum(0), x[:, ::4].sum(0)])
    return Probe("add_to_global", x, before + sums)


def tma_load_boxes() -> Probe:
    """Boxes within a tensor, and across each of its borders; by (column, row, head, batch)."""
    x = random_bytes(2, 40, 3, 72, 2).view(np.uint16)[..., 0].copy()
    starts = [(0, 0, 0, 0), (0, 16, 2, 1), (64, 0, 1, 1), (5, 30, 0, 1), (-9, -7, 1, 0)]
    starts += [(0, 40, 0, 0), (0, -24, 0, 0), (72, 0, 0, 0), (-64, 0, 0, 0), (0, 1 << 30, 0, 0)]
    starts += [(0, 0, -1, 0), (0, 0, 3, 0), (0, 0, 0, -1), (0, 0, 0, 2)]
    expected = np.stack([panel_of_box(x, start) for start in starts])
    return Probe("tma_load_boxes", x, expected, {"seqused_k": np.array(starts, np.int32)})


def panel_of_box(x: Array, start: tuple[int, int, int, int]) -> Array:
    """A box in shared memory: the swizzle permutes the chunks of 8 elements of a row."""
    column, row, head, batch = start
    panel = np.zeros((BOX_ROWS, 8, 8), np.uint16)
    for i, j in np.ndindex(BOX_ROWS, BOX_COLUMNS):
        place = (batch, row + i, head, column + j)
        if all(0 <= index < size for index, size in zip(place, x.shape, strict=True)):
            panel[i, j // 8 ^ i % 8, j % 8] = x[place]
    return panel


def store_matrices() -> Probe:
    held = random_bytes(32, 4, 2, 2).view(np.uint16)[..., 0].copy()
    # Lane 4g + t holds the elements (g, 2t) and (g, 2t + 1) of each matrix.
    matrices = held.transpose(1, 0, 2).reshape(32, 8).copy()
    return Probe("store_matrices", held, matrices)


def product(kernel: str) -> Probe:
    """A (64 x depth) B (depth x N). A letter is the summed index: c for columns, r for rows."""
    found = re.fullmatch(r"product_(bf16|fp16)_(\d+)_([cr])([cr])_[a-z]+_?(\d*)", kernel)
    assert found
    element, n, major_a, major_b = found[1], int(found[2]), found[3], found[4]
    depth = int(found[5] or 32)
    a, b = (bits_of(RANDOM.standard_normal(shape), element) for shape in ((64, depth), (depth, n)))
    exact = values_of(a, element).astype(float) @ values_of(b, element).astype(float)
    left, right = (a if major_a == "c" else a.T), (b.T if major_b == "c" else b)
    given, v = (np.ascontiguousarray(x)[None, :, None] for x in (left, right))
    return Probe(kernel, given, exact.astype(np.float32), {"v": v}, absolute=depth * 1.25e-6)


def product_kernels() -> list[str]:
    """The names of the wgmma kernels in conformance_sm90.cu.

    First those that no other code is known to use: if one of them fails on a GPU, set
    PARTIAL_SWIZZLE_ATOMS in the kernel table to False.
    """
    source = (ROOT / "tests" / "gpu" / "conformance_sm90.cu").read_text()
    edges = [
        f"product_{element}_{form}"
        for element in re.findall(r"^ +EDGE_PRODUCTS\((\w+), \w+\)", source, re.MULTILINE)
        for form in re.findall(r'"_(\d\w+_\d+)"', source)
    ]
    several = [
        f"product_{element}_{n}_{form}"
        for element, n in re.findall(r"^ +PRODUCTS\((\w+), \w+, (\d+)\)", source, re.MULTILINE)
        for form in ("cc_shared", "cr_shared", "cr_registers")
    ]
    return edges + several + re.findall(r'"(product_\w+)"', source)


PROBES = [
    *(product(name) for name in product_kernels()),
    *(identities(), share_registers(), advice()),
    *(reverse_in_warp(), reverse_by_named_barriers(), reverse_by_mbarriers()),
    *(add_to_global(), tma_load_boxes(), store_matrices()),
]
