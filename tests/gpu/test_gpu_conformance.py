"""Every instruction of csrc/machine.cuh does the same on a GPU, in the emulator and in NumPy."""

from __future__ import annotations

import re
from pathlib import Path
from runpy import run_path
from types import ModuleType

import emulator
import emulator_build
import pytest
import torch
from conformance import (
    PROBES,
    ROOT,
    Probe,
    answer_of_the_emulator,
    answer_of_the_gpu,
    build_for_gpu,
)

over_probes = pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.kernel)


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    source = ROOT / "tests" / "gpu" / "conformance.cu"
    return emulator.import_file(emulator_build.build_module("conformance_emulator", [source]))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return emulator.import_file(build_for_gpu(tmp_path_factory.mktemp("conformance"), arch))


@over_probes
def test_the_emulator_does_what_numpy_expects(emulated: ModuleType, probe: Probe) -> None:
    probe.assert_answered(answer_of_the_emulator(emulated, probe))


@pytest.mark.cuda
@over_probes
def test_a_gpu_does_what_the_emulator_does(
    gpu: ModuleType, emulated: ModuleType, probe: Probe
) -> None:
    probe.assert_answered(answer_of_the_gpu(gpu, probe), answer_of_the_emulator(emulated, probe))


def test_every_kernel_has_a_probe(emulated: ModuleType) -> None:
    assert sorted(probe.kernel for probe in PROBES) == sorted(emulated.kernels())


def test_every_instruction_is_in_a_kernel() -> None:
    machine = (ROOT / "csrc" / "machine.cuh").read_text()
    instructions = set(re.findall(r"^DEVICE .*?(\w+)\(", machine, re.MULTILINE))
    headers = ("tests/gpu/conformance_kernels.cuh", "tests/emulator/probes/instructions.h")
    kernels = "".join((ROOT / header).read_text() for header in headers)
    assert len(instructions) > 15
    assert {x for x in instructions if not re.search(rf"\b{x}\b", kernels)} == set()


@pytest.mark.skipif(
    run_path(str(ROOT / "setup.py"))["find_toolkit"]() is None, reason="nvcc is not installed"
)
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    module = emulator.import_file(build_for_gpu(tmp_path, "sm_80"))
    assert sorted(probe.kernel for probe in PROBES) == sorted(module.kernels())
