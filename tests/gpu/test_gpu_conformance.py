"""Every instruction under csrc does the same on a GPU, in the emulator and in NumPy."""

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
    answer_of_the_emulator,
    answer_of_the_gpu,
    build_for_gpu,
)


@dataclass(frozen=True)
class Machine:
    """Instructions, and the kernels that try them.

    Attributes:
        source: of the kernels, in this folder.
        kernels: all files that they consist of.
        instructions: the files that define the instructions.
        arch: what to compile for where there is no GPU.
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
        """The kernels on the current GPU; skips the test where it is none for them."""
        capability = torch.cuda.get_device_capability()
        if self.arch == "sm_90a" and capability != (9, 0):
            pytest.skip("the GPU's compute capability is not 9.0")
        if "gpu" not in self.modules:
            arch = self.arch if self.arch == "sm_90a" else "sm_{}{}".format(*capability)
            self.modules["gpu"] = emulator.import_file(build_for_gpu(folder, self.source, arch))
        return self.modules["gpu"]


MACHINES = {
    "sm80": Machine(
        "conformance.cu",
        conformance.PROBES,
        ["tests/gpu/conformance_kernels.cuh", "tests/emulator/probes/instructions.h"],
        ["csrc/common/ptx.cuh"],
        "sm_80",
    ),
    "sm90": Machine(
        "conformance_sm90.cu",
        conformance_sm90.PROBES,
        ["tests/gpu/conformance_kernels_sm90.cuh"],
        ["csrc/sm90/ptx.cuh", "csrc/sm90/wgmma.cuh"],
        "sm_90a",
    ),
}

over_machines = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
over_probes = pytest.mark.parametrize(
    ("machine", "probe"),
    [
        pytest.param(machine, probe, id=f"{name}-{probe.kernel}")
        for name, machine in MACHINES.items()
        for probe in machine.probes
    ],
)


@over_probes
def test_the_emulator_does_what_numpy_expects(machine: Machine, probe: Probe) -> None:
    probe.assert_answered(answer_of_the_emulator(machine.emulated(), probe))


@pytest.mark.cuda
@over_probes
def test_a_gpu_does_what_the_emulator_does(
    machine: Machine, probe: Probe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gpu = machine.on_gpu(tmp_path_factory.mktemp("conformance"))
    emulated = answer_of_the_emulator(machine.emulated(), probe)
    probe.assert_answered(answer_of_the_gpu(gpu, probe), emulated)


@over_machines
def test_every_kernel_has_a_probe(machine: Machine) -> None:
    assert sorted(probe.kernel for probe in machine.probes) == sorted(machine.emulated().kernels())


@over_machines
def test_every_instruction_is_in_a_kernel(machine: Machine) -> None:
    source = "".join((ROOT / file).read_text() for file in machine.instructions)
    kernels = "".join((ROOT / file).read_text() for file in machine.kernels)
    instructions = set(re.findall(r"^ *DEVICE .*?(\w+)\(", source, re.MULTILINE))
    assert len(instructions) > 15
    assert {x for x in instructions if not re.search(rf"\b{x}\b", kernels)} == set()


def test_every_width_of_a_product_is_tried() -> None:
    source = (ROOT / "csrc" / "sm90" / "wgmma.cuh").read_text()
    widths = set(re.findall(r"^JVP_ATTN_WGMMA\((\d+),", source, re.MULTILINE))
    tried = {name.split("_")[2] for name in conformance_sm90.names_of_products()}
    assert widths
    assert widths == tried


@pytest.mark.skipif(
    run_path(str(ROOT / "setup.py"))["find_toolkit"]() is None, reason="nvcc is not installed"
)
@pytest.mark.slow
@over_machines
def test_the_kernels_compile_for_a_gpu(machine: Machine, tmp_path: Path) -> None:
    module = emulator.import_file(build_for_gpu(tmp_path, machine.source, machine.arch))
    assert sorted(probe.kernel for probe in machine.probes) == sorted(module.kernels())
