"""What the tests of the emulator share: its small kernels, launched on NumPy arrays.

`EMULATOR_VARIANT=sanitized` (or portable) runs them in that variant of the build.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import emulator
import emulator_build
import numpy as np
from numpy.typing import DTypeLike, NDArray

VARIANTS = {
    variant.name: variant
    for variant in (emulator_build.PLAIN, emulator_build.SANITIZED, emulator_build.PORTABLE)
}
ROW_COLUMNS = 64


@cache
def load() -> ModuleType:
    """Import the module with the small kernels, built anew if it is not up to date."""
    variant = VARIANTS[os.environ.get("EMULATOR_VARIANT", "plain")]
    sources = sorted((emulator_build.HERE / "probes").glob("*.cpp"))
    return emulator.import_file(emulator_build.build_module("probe_emulator", sources, variant))


def aligned(array: NDArray) -> NDArray:
    """A copy that starts at a multiple of 16 bytes, as what CUDA allocates does."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_instruction(
    name: str, x: NDArray, shape: tuple[int, ...], dtype: DTypeLike, *, count: int = 0
) -> NDArray:
    """What a kernel of one instruction makes of x; count is its seqlen_q."""
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
    """Rows of whole numbers, which bfloat16 holds, and whose sums float32 holds."""
    random = np.random.default_rng(0)
    return random.integers(-8, 9, (batch, count, ROW_COLUMNS)).astype(np.float32)


def sums(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the kernel of probes/row_sums.h should compute."""
    return x @ np.arange(1, ROW_COLUMNS + 1, dtype=np.float32)


def run_row_sums(
    fault: str, x: NDArray[np.float32], *, seed: int = 0, checked: bool = True
) -> NDArray[np.float32]:
    """The sums of rows x, by the kernel of probes/row_sums.h with a fault."""
    machine = load()
    q = aligned((x.view(np.uint32) >> 16).astype(np.uint16))
    result = np.full((2, *x.shape[:2]), np.nan, np.float32)[0]  # beyond its end is no other buffer
    params = machine.AttentionParams()
    params.q = machine.Tensor(q.ctypes.data, 0, 0, 0)
    params.lse = machine.RowVector(result.ctypes.data, 0, 0)
    params.batch, params.seqlen_q = x.shape[:2]
    inputs, outputs = ({"q": q}, {"result": result}) if checked else ({}, {})
    with emulator.launching(machine, seed=seed, inputs=inputs, outputs=outputs):
        machine.launch(fault, params, 0)
    return result
