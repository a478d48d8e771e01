"""Launches the probe kernels of the emulator's tests on NumPy arrays.

`EMULATOR_VARIANT=sanitized` (or portable) runs them in that variant of the build.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.emulator import emulator, emulator_build

VARIANTS = {
    variant.name: variant
    for variant in (emulator_build.PLAIN, emulator_build.SANITIZED, emulator_build.PORTABLE)
}
ROW_COLUMNS = 64


@cache
def load() -> ModuleType:
    """Import the module with the probe kernels; build it first if it is not up to date."""
    variant = VARIANTS[os.environ.get("EMULATOR_VARIANT", "plain")]
    sources = sorted((emulator_build.HERE / "probes").glob("*.cpp"))
    return emulator.import_file(emulator_build.build_module("probe_emulator", sources, variant))


def aligned(array: NDArray) -> NDArray:
    """A copy that starts at a multiple of 16 bytes, as CUDA allocates memory."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_instruction(
    name: str, x: NDArray, shape: tuple[int, ...], dtype: DTypeLike, *, count: int = 0
) -> NDArray:
    """The output of a kernel of one instruction for input x; count is its seqlen_q."""
    machine = load()
    x, result = aligned(x), aligned(np.zeros(shape, dtype))
    params = machine.AttentionParams()
    params.q = machine.Tensor(x.ctypes.data, 0, 0, 0)
    params.out = machine.Tensor(result.ctypes.data, 0, 0, 0)
    params.seqlen_q = count
    with emulator.launching(machine, inputs={"x": x}, outputs={"result": result}):
        machine.launch(name, params, 0)
    return result


def rows(batch: int, count: int) -> NDArray[np.float32]:
    """Rows of integers that are exact in bfloat16, and whose sums are exact in float32."""
    random = np.random.default_rng(0)
    return random.integers(-8, 9, (batch, count, ROW_COLUMNS)).astype(np.float32)


def bfloat16_of(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of numbers that are exact in bfloat16."""
    return aligned((x.view(np.uint32) >> 16).astype(np.uint16))


def sums(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The expected result of the kernel of probes/row_sums.h."""
    return x @ np.arange(1, ROW_COLUMNS + 1, dtype=np.float32)


def run_row_sums(
    fault: str, x: NDArray[np.float32], *, seed: int = 0, checked: bool = True
) -> NDArray[np.float32]:
    """The sums of rows x, by the kernel of probes/row_sums.h with a fault."""
    machine = load()
    q = bfloat16_of(x)
    result = np.full((2, *x.shape[:2]), np.nan, np.float32)[0]  # no other buffer follows
    params = machine.AttentionParams()
    params.q = machine.Tensor(q.ctypes.data, 0, 0, 0)
    params.lse = machine.RowVector(result.ctypes.data, 0, 0)
    params.batch, params.seqlen_q = x.shape[:2]
    inputs, outputs = ({"q": q}, {"result": result}) if checked else ({}, {})
    with emulator.launching(machine, seed=seed, inputs=inputs, outputs=outputs):
        machine.launch(fault, params, 0)
    return result


def small_integers(*shape: int, seed: int) -> NDArray[np.float32]:
    """Random -1, 0 and 1, so that products of two matrices are exact in bfloat16."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


def run_tile_products(
    fault: str,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    *,
    seed: int = 0,
) -> dict[str, NDArray]:
    """The outputs, by name, of the kernel of probes/tile_products.h with a fault."""
    machine = load()
    inputs = {name: bfloat16_of(x) for name, x in {"q": q, "k": k, "v": v}.items()}
    batch, rows_of_q, _ = q.shape
    sums = [np.full((batch, rows_of_q, v.shape[2]), np.nan, np.float32) for _ in range(2)]
    outputs = {
        "out": sums[0],
        "tout": sums[1],
        "lse": np.full((batch, 2 * rows_of_q), np.nan, np.float32),
        "mu": aligned(np.zeros((batch, 128), np.float32)),
        "delta": np.zeros((batch, 64), np.float32),
    }
    params = machine.AttentionParams()
    params.batch, params.heads, params.heads_k = batch, 1, 1
    params.seqlen_q, params.seqlen_k = rows_of_q, k.shape[1]
    params.head_dim, params.head_dim_v = q.shape[2], v.shape[2]
    for name, x in (inputs | outputs).items():
        if x.ndim == 2:
            setattr(params, name, machine.RowVector(x.ctypes.data, 0, 0))
        else:
            of_batch, of_row = (stride // x.itemsize for stride in x.strides[:2])
            setattr(params, name, machine.Tensor(x.ctypes.data, of_batch, of_row, of_row))
    with emulator.launching(machine, seed=seed, inputs=inputs, outputs=outputs):
        machine.launch(f"sm90_{fault}", params, 0)
    return outputs
