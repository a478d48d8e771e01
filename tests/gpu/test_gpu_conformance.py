"""Every instruction in csrc/ gives the same results on a GPU, in the emulator and in NumPy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path
from types import ModuleType

import pytest
import torch

from tests.emulator import emulator, emulator_build
from tests.gpu import conformance, conformance_sm90
from tests.gpu.conformance import (
    ROOT,
    Probe,
    build_for_gpu,
    run_in_the_emulator,
    run_on_the_gpu,
)


@dataclass(frozen=True)
class InstructionSet:
    """Instructions of an architecture, and the kernels that test them.

    Attributes:
        source: of the kernels, in this folder.
        kernels: all files with these kernels.
        instructions: the files that define the instructions.
        arch: the architecture to compile for without a GPU.
    """

    source: str
    probes: list[Probe]
    kernels: list[str]
    instructions: list[str]
    arch: str
    modules: dict[str, ModuleType] = field(default_factory=dict)

    def emulated(self) -> ModuleType:
        """The kernels in the emulator."""
        if "emulated" not in self.modules:
            name = f"{Path(self.source).stem}_emulator"
            module = emulator_build.build_module(name, [ROOT / "tests" / "gpu" / self.source])
            self.modules["emulated"] = emulator.import_file(module)
        return self.modules["emulated"]

    def on_gpu(self, folder: Path) -> ModuleType:
        """The kernels on the current GPU; skips the test if the GPU does not support them."""
        capability = torch.cuda.get_device_capability()
        if self.arch == "sm_90a" and capability != (9, 0):
            pytest.skip("the GPU's compute capability is not 9.0")
        if "gpu" not in self.modules:
            arch = self.arch if self.arch == "sm_90a" else "sm_{}{}".format(*capability)
            self.modules["gpu"] = emulator.import_file(build_for_gpu(folder, self.source, arch))
        return self.modules["gpu"]


INSTRUCTION_SETS = {
    "sm90": InstructionSet(
        "conformance_sm90.cu",
        conformance_sm90.PROBES,
        ["tests/gpu/conformance_kernels_sm90.cuh"],
        ["csrc/sm90/ptx.cuh", "csrc/sm90/wgmma.cuh"],
        "sm_90a",
    ),
    "sm80": InstructionSet(
        "conformance.cu",
        conformance.PROBES,
        ["tests/gpu/conformance_kernels.cuh", "tests/emulator/probes/instructions.h"],
        ["csrc/common/ptx.cuh"],
        "sm_80",
    ),
}

over_instruction_sets = pytest.mark.parametrize(
    "isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS
)
over_probes = pytest.mark.parametrize(
    ("isa", "probe"),
    [
        pytest.param(isa, probe, id=f"{name}-{probe.kernel}")
        for name, isa in INSTRUCTION_SETS.items()
        for probe in isa.probes
    ],
)


@over_probes
def test_the_emulator_agrees_with_numpy(isa: InstructionSet, probe: Probe) -> None:
    probe.assert_agrees(run_in_the_emulator(isa.emulated(), probe))


@pytest.mark.cuda
@over_probes
def test_a_gpu_agrees_with_the_emulator(
    isa: InstructionSet, probe: Probe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gpu = isa.on_gpu(tmp_path_factory.mktemp("conformance"))
    emulated = run_in_the_emulator(isa.emulated(), probe)
    probe.assert_agrees(run_on_the_gpu(gpu, probe), emulated)


@over_instruction_sets
def test_every_kernel_has_a_probe(isa: InstructionSet) -> None:
    assert sorted(probe.kernel for probe in isa.probes) == sorted(isa.emulated().kernels())


@over_instruction_sets
def test_every_instruction_is_in_a_kernel(isa: InstructionSet) -> None:
    source = "".join((ROOT / file).read_text() for file in isa.instructions)
    kernels = "".join((ROOT / file).read_text() for file in isa.kernels)
    instructions = set(re.findall(r"^ *DEVICE .*?(\w+)\(", source, re.MULTILINE))
    assert len(instructions) > 15
    assert {x for x in instructions if not re.search(rf"\b{x}\b", kernels)} == set()


def test_every_wgmma_width_is_tested() -> None:
    source = (ROOT / "csrc" / "sm90" / "wgmma.cuh").read_text()
    widths = set(re.findall(r"^JVP_ATTN_WGMMA\((\d+),", source, re.MULTILINE))
    tried = {name.split("_")[2] for name in conformance_sm90.product_kernels()}
    assert widths
    assert widths == tried


@pytest.mark.skipif(
    run_path(str(ROOT / "setup.py"))["find_toolkit"]() is None, reason="nvcc is not installed"
)
@pytest.mark.slow
@over_instruction_sets
def test_the_kernels_compile_for_a_gpu(isa: InstructionSet, tmp_path: Path) -> None:
    module = emulator.import_file(build_for_gpu(tmp_path, isa.source, isa.arch))
    assert sorted(probe.kernel for probe in isa.probes) == sorted(module.kernels())
