"""The compile gate checks what the compiler made of every CUDA kernel.

    python -m tests.compile_gate.compile_gate [--arch sm_80] [--kernels PATTERN] [--out FOLDER]
    python -m tests.compile_gate.compile_gate --built ...

The first form compiles each kernel of jvp_attn/backends/kernel_table.py by itself; the second reads
the objects and reports that the build (setup.py, make) left in build/objects. Both print a table of
ptxas' report and of the machine code. They exit with 1 where a kernel breaks a limit: it spills or
uses a stack, uses neither tensor cores nor asynchronous copies, gets a warning of ptxas, or takes
more shared memory than a block can have. Kernels for compute capability 9.0 are checked for sm_90a;
their loops must also follow loop_rules.py, and may not be longer than the report in
benchmarks/results records. --out writes this report, kernel-registers-<arch>.json, to a folder.
--phases prints the phases of each loop. Needs nvcc, nvdisasm and, for --built, cuobjdump (PyPI:
nvidia-cuda-nvdisasm, nvidia-cuda-cuobjdump), and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry
from tests.compile_gate.compiler_report import (
    Instructions,
    PtxasReport,
    count_instructions,
    read_ptxas,
)
from tests.compile_gate.cuda_tools import ROOT, SETUP, cuda_tool, nvcc
from tests.compile_gate.kernel_doc import REPORT, warpgroups_of
from tests.compile_gate.loop_report import NO_LOOPS, LoopReport, read_loops
from tests.compile_gate.loop_rules import growth_faults, loop_faults
from tests.compile_gate.sass import Program, parse

GENERATE = SimpleNamespace(**run_path(str(ROOT / "csrc" / "generate.py")))
BUILT = ROOT / SETUP.CUDA_OBJECTS

# The shared memory that a block can have on every GPU that runs the kernel.
MAX_SHARED_BYTES = {"sm80": 99 * 1024, "sm90": 227 * 1024}

# The instructions that a kernel with tiles must have, and what it means if there are none.
REQUIRED = {
    "sm80": {
        "hmma": "the tensor cores are not used",
        "ldgsts": "no copy is asynchronous",
    },
    "sm90": {
        "hgmma": "the tensor cores are not used by warpgroups",
        "utmaldg": "the TMA is not used",
        "usetmaxreg": "warpgroups do not reallocate registers",
    },
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. `shared_bytes` is the shared memory that its launch asks for."""

    ptxas: PtxasReport
    instructions: Instructions
    shared_bytes: int
    loops: LoopReport = NO_LOOPS

    @staticmethod
    def of(entry: KernelEntry, ptxas: PtxasReport, program: Program, shared_bytes: int) -> Compiled:
        loops = read_loops(program, warpgroups_of(entry)) if entry.arch == "sm90" else NO_LOOPS
        return Compiled(ptxas, count_instructions(program), shared_bytes, loops)


# ----------------------------------------------------------------------------
# Compiling each kernel by itself


class CompilationFailed(Exception):
    """A compiler or disassembler failed; the message holds its output."""


def for_arch(entries: Iterable[KernelEntry], arch: str) -> list[KernelEntry]:
    """The kernels that run on that GPU, nvcc's "sm_80"."""
    return [entry for entry in entries if entry.arch == "sm80" or arch == "sm_90a"]


def compile_all(entries: Iterable[KernelEntry], arch: str) -> dict[str, Compiled]:
    """Compile kernels in parallel: MAX_JOBS at a time, by default one per core.

    Args:
        entries: kernels of the table, or like them.
        arch: nvcc's name of the GPU, such as "sm_80".

    Returns:
        The compiled kernels that are for that GPU, by name.

    Raises:
        CompilationFailed: nvcc or nvdisasm failed.
    """
    entries = for_arch(entries, arch)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        GENERATE.generate(Path(folder), entries)
        compiled = pool.map(partial(compile_one, Path(folder), arch=arch), entries)
        return {entry.name: x for entry, x in zip(entries, compiled, strict=True)}


def compile_one(folder: Path, entry: KernelEntry, arch: str) -> Compiled:
    source, cubin = folder / f"{entry.name}.cu", folder / f"{entry.name}.cubin"
    wrapper = Path(__file__).with_name(f"one_{entry.arch}_kernel.cuh")
    report = output_of(
        *(nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin"),
        *("-I", ROOT / "csrc", "-include", wrapper),
        *(source, "-o", cubin),
    )
    ptxas = read_ptxas(report)
    # one_sm80_kernel.cuh defines a variable that is one byte larger than the shared memory.
    return Compiled.of(entry, ptxas, disassemble(cubin), shared_bytes=ptxas.global_bytes - 1)


def disassemble(cubin: Path) -> Program:
    return parse(output_of(cuda_tool("nvdisasm"), "--print-code", cubin))


def output_of(*command: object) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise CompilationFailed(f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


# ----------------------------------------------------------------------------
# Reading what the build made


class NotBuilt(Exception):
    """The build has no such kernel, or none for that GPU."""


def read_build(
    entries: Iterable[KernelEntry], arch: str, objects: Path = BUILT
) -> dict[str, Compiled]:
    """Read compiled kernels from the objects and logs of the last build.

    Args:
        entries: kernels of the table.
        arch: nvcc's name of the GPU, such as "sm_80".
        objects: the build's folder with <kernel>.o and <kernel>.o.log.

    Returns:
        The kernels that are for that GPU, by name.

    Raises:
        NotBuilt: the build lacks a kernel, or has none for that GPU.
        CompilationFailed: cuobjdump or nvdisasm failed.
    """
    entries = for_arch(entries, arch)
    shared_bytes = shared_bytes_of_build()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        read = partial(read_built, Path(folder), shared_bytes, objects=objects, arch=arch)
        compiled = pool.map(read, entries)
        return {entry.name: x for entry, x in zip(entries, compiled, strict=True)}


def shared_bytes_of_build() -> dict[str, int]:
    try:
        from jvp_attn import _C
    except ImportError as error:
        raise NotBuilt(f"there is no CUDA extension: {error}") from error
    return {name: kernel["shared_bytes"] for name, kernel in _C.kernels().items()}


def read_built(
    folder: Path, shared_bytes: dict[str, int], entry: KernelEntry, objects: Path, arch: str
) -> Compiled:
    path, log = objects / f"{entry.name}.o", objects / f"{entry.name}.o.log"
    if not (path.exists() and log.exists()):
        raise NotBuilt(f"{path} or its log is missing: run make build/cuda")
    extract = [str(cuda_tool("cuobjdump")), "--extract-elf", f".{arch}.", str(path.resolve())]
    subprocess.run(extract, cwd=folder, capture_output=True, check=False)
    cubins = list(folder.glob(f"{entry.name}.*.{arch}.cubin"))
    if len(cubins) != 1:
        raise NotBuilt(f"{path} has {len(cubins)} machine codes for {arch}, not one")
    ptxas = read_ptxas(log.read_text(), arch)
    return Compiled.of(entry, ptxas, disassemble(cubins[0]), shared_bytes[entry.name])


# ----------------------------------------------------------------------------
# Judging


def faults(entry: KernelEntry, compiled: Compiled, recorded: int | None = None) -> list[str]:
    """Every limit that a kernel breaks, as a sentence.

    Args:
        entry: the kernel in the table.
        compiled: what the compiler made of it.
        recorded: how many instructions its loops had before; None if that is not known.
    """
    ptxas, found = compiled.ptxas, compiled.instructions
    faults = [f"ptxas warns: {warning}" for warning in ptxas.warnings]
    for what, size in (
        ("spill stores", ptxas.spill_stores),
        ("spill loads", ptxas.spill_loads),
        ("stack", ptxas.stack),
    ):
        if size:
            faults.append(f"{size} bytes of {what}")
    if found.local:
        faults.append(f"{found.local} instructions LDL and STL, which use local memory")
    if entry.tile is not None:  # a kernel without tiles multiplies no matrices
        faults += [
            f"no instruction {name.upper()}: {meaning}"
            for name, meaning in REQUIRED[entry.arch].items()
            if not getattr(found, name)
        ]
    limit = MAX_SHARED_BYTES[entry.arch]
    if compiled.shared_bytes > limit:
        faults.append(f"{compiled.shared_bytes} bytes of shared memory, a block can have {limit}")
    faults += loop_faults(entry, compiled.loops)
    faults += growth_faults(compiled.loops, recorded)
    return [f"{entry.name}: {fault}" for fault in faults]


def all_faults(compiled: dict[str, Compiled], recorded: dict[str, int] | None = None) -> list[str]:
    """The faults of all the kernels; `recorded` has the instructions of their loops by name."""
    recorded = recorded or {}
    return [
        fault
        for name, x in compiled.items()
        for fault in faults(KERNELS[name], x, recorded.get(name))
    ]


def recorded_instructions(arch: str, report: Path = REPORT) -> dict[str, int]:
    """The instructions of each kernel's loops in the recorded report of this compiler version.

    Another version may well need more or fewer: then there are none to compare with.
    """
    path = report.with_name(f"kernel-registers-{arch}.json")
    if not path.exists():
        return {}
    found = json.loads(path.read_text("utf-8"))
    if found["nvcc"] != SETUP.find_toolkit().version:
        return {}
    return {name: x["loop_instructions"] for name, x in found["kernels"].items()}


# ----------------------------------------------------------------------------
# Reporting


def row(compiled: Compiled) -> dict[str, int | None]:
    """The numbers of a kernel in the table and the JSON file; None if there is none."""
    ptxas, count = compiled.ptxas, compiled.instructions
    return {
        "registers": ptxas.registers,
        "spill_stores": ptxas.spill_stores,
        "spill_loads": ptxas.spill_loads,
        "stack": ptxas.stack,
        "shared_bytes": compiled.shared_bytes,
        **{"instructions" if name == "total" else name: n for name, n in asdict(count).items()},
        **compiled.loops.numbers(),
    }


def as_table(compiled: dict[str, Compiled]) -> str:
    """One line per kernel."""
    rows = {name: row(x) for name, x in compiled.items()}
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" ".join([f"{'kernel':{width}}", *columns])]
    for name, values in rows.items():
        cells = [f"{_cell(values[column]):>{len(column)}}" for column in columns]
        lines.append(" ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def _cell(number: int | None) -> str:
    return "-" if number is None else str(number)


def as_json(compiled: dict[str, Compiled], arch: str) -> str:
    """The same numbers as JSON, with one line per kernel."""
    kernels = (f"    {json.dumps(name)}: {json.dumps(row(x))}" for name, x in compiled.items())
    version = SETUP.find_toolkit().version
    return (
        f'{{\n  "arch": "{arch}",\n  "nvcc": "{version}",\n  "kernels": {{\n'
        + ",\n".join(kernels)
        + "\n  }\n}\n"
    )


def as_phases(compiled: dict[str, Compiled]) -> str:
    """The phases of each loop over tiles, a line each."""
    return "\n".join(
        "\n".join([f"{name}, the loop at {role.address:#x}:", *role.phases])
        for name, x in compiled.items()
        for role in x.loops.roles
    )


def main() -> None:
    """Compile or read the build, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_80", help="as nvcc names it: sm_80, sm_90a, ...")
    parser.add_argument("--kernels", default="*", help="only those whose name matches: forward*")
    parser.add_argument("--built", action="store_true", help="read build/objects; compile nothing")
    parser.add_argument("--out", type=Path, help="write kernel-registers-<arch>.json there")
    parser.add_argument("--phases", action="store_true", help="print the phases of each loop")
    options = parser.parse_args()

    entries = [entry for entry in KERNELS.values() if fnmatchcase(entry.name, options.kernels)]
    if not entries:
        sys.exit(f"no kernel is called {options.kernels}; there are {', '.join(KERNELS)}")
    compiled = (read_build if options.built else compile_all)(entries, options.arch)
    if not compiled:
        sys.exit(f"no kernel that matches {options.kernels} is for {options.arch}")
    print(as_table(compiled))
    if options.phases:
        print(as_phases(compiled))
    recorded = recorded_instructions(options.arch)
    if options.out:
        path = options.out / f"kernel-registers-{options.arch}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(compiled, options.arch))
        print(f"wrote {path}")
    if found := all_faults(compiled, recorded):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
