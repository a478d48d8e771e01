"""The sm90 kernels compiled without products of parts of swizzle atoms compute the same."""

from __future__ import annotations

from functools import cache
from types import ModuleType, SimpleNamespace

import pytest

from jvp_attn.backends.kernel_table import KERNELS, OF_ROWS
from tests.emulator import emulator, emulator_build
from tests.emulator.emulator_build import Variant
from tests.kernels import harness
from tests.kernels.cases import Case, axes_of, covering, family_of
from tests.kernels.kernel_case import kernel_test

DIFFERENT = {("backward", 128), ("backward_dq", 64)}
KERNELS_OF_WHOLE_ATOMS = [
    name
    for name, kernel in KERNELS.items()
    if kernel.arch == "sm90" and (kernel.step, kernel.head_dim) in DIFFERENT
]
CASES = [
    case
    for name in KERNELS_OF_WHOLE_ATOMS
    for case in covering({**axes_of(family_of(KERNELS[name])), "kernel": [name]}, strength=1)
]


@cache
def whole_atoms_emulator() -> ModuleType:
    """The module with these kernels, and those of rows."""
    file = emulator_build.build_kernels(
        Variant("whole_atoms", ("-DJVP_ATTN_PARTIAL_SWIZZLE_ATOMS=0",)),
        wanted=lambda name: name in KERNELS_OF_WHOLE_ATOMS or KERNELS[name].step in OF_ROWS,
    )
    return emulator.import_file(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", CASES, ids=[f"{case['kernel']}-{i}" for i, case in enumerate(CASES)]
)
def test_a_sample_of_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(load=whole_atoms_emulator, launching=emulator.launching)
    monkeypatch.setattr(harness, "emulator", machine)
    test = kernel_test(case)
    assert test.faults(test.run()) == []
