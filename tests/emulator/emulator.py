"""Launches CUDA kernels on a CPU, on NumPy arrays or CPU tensors.

    machine = emulator.load()
    with emulator.launching(machine, seed=1, inputs={"q": q, ...}, outputs={"out": out}):
        machine.launch("forward_bf16_d64", params, stream=0)

A kernel that breaks a rule of CUDA raises RuntimeError, which names the kernel, the block, the
thread, and the line.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.emulator import emulator_build


@cache
def load() -> ModuleType:
    """Import the module with all kernels of the kernel table; build it first if necessary.

    It has `kernels`, `launch`, `AttentionParams` and the other names of csrc/kernel_bindings.h.
    """
    return import_file(emulator_build.build_kernels())


def import_file(file: Path) -> ModuleType:
    """Import an extension module from its file.

    Its name begins with that of its folder: pybind11 gives two modules of one name the contents of
    the first.
    """
    folder = re.sub(r"\W", "_", str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"{folder}.{file.name.partition('.')[0]}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def launching(
    machine: ModuleType,
    *,
    seed: int = 0,
    capability: tuple[int, int] = (9, 0),
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Configure the emulator for the launches in the `with` block.

    Args:
        machine: what `load` returned.
        seed: determines the order in which blocks and threads run.
        capability: the compute capability that kernels see. All instructions work with any.
        inputs: memory that kernels may read, by its name in reports: NumPy arrays, CPU tensors,
            or pairs (address, bytes).
        outputs: memory that they may also write.

    With neither inputs nor outputs, accesses to global memory are checked for alignment only.
    """
    machine.set_seed(seed)
    machine.set_capability(*capability)
    machine.set_buffers(
        [(name, *extent(memory), False) for name, memory in (inputs or {}).items()]
        + [(name, *extent(memory), True) for name, memory in (outputs or {}).items()]
    )
    try:
        yield
    finally:
        machine.set_seed(0)
        machine.set_capability(9, 0)
        machine.set_buffers([])


def extent(memory: Any) -> tuple[int, int]:
    """The address and the number of bytes of an array, a CPU tensor, or such a pair."""
    if isinstance(memory, tuple):
        return memory
    if isinstance(memory, np.ndarray):
        start, end = np.lib.array_utils.byte_bounds(memory)
        return start, end - start
    if 0 in memory.shape:
        return memory.data_ptr(), 0
    last = sum((n - 1) * stride for n, stride in zip(memory.shape, memory.stride(), strict=True))
    return memory.data_ptr(), (last + 1) * memory.element_size()
