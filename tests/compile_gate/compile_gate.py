"""The compile gate: what the compiler made of every kernel, and what it must not have made.

    python tests/compile_gate/compile_gate.py [--arch sm_80] [--kernels PATTERN] [--out FOLDER]

Compiles each kernel of jvp_attn/backends/kernel_table.py by itself, reads ptxas' report and the
machine code, prints a table and exits with 1 where a kernel breaks a limit: spills and stack beyond
the table's, tensor cores or asynchronous copies unused, more shared memory than a block can have. The
kernels that are for compute capability 9.0 alone compile for sm_90a alone. With --out it writes
kernel-registers-<arch>.json. Needs nvcc and nvdisasm (PyPI: nvidia-cuda-nvdisasm), no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry
from tests.compile_gate.compiler_report import (
    Instructions,
    PtxasReport,
    read_disassembly,
    read_ptxas,
)

ROOT = Path(__file__).resolve().parents[2]
GENERATE = SimpleNamespace(**run_path(str(ROOT / "csrc" / "generate.py")))
SETUP = SimpleNamespace(**run_path(str(ROOT / "setup.py")))

# What a block can have on every GPU that a kernel is for: of capability 8.0 and newer, and of 9.0.
MAX_SHARED_BYTES = {"sm80": 99 * 1024, "sm90": 227 * 1024}

# The instructions that a kernel with tiles must have, and what it means if it has none.
REQUIRED = {
    "sm80": {
        "hmma": "the tensor cores are not used",
        "ldgsts": "no copy is asynchronous",
    },
    "sm90": {
        "hgmma": "the tensor cores are not used by warpgroups",
        "utmaldg": "the TMA is not used",
        "usetmaxreg": "warpgroups do not share registers as they need them",
    },
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it."""

    ptxas: PtxasReport
    instructions: Instructions

    @property
    def shared_bytes(self) -> int:
        """What a launch asks for; one_sm80_kernel.cuh says how it gets here."""
        return self.ptxas.global_bytes - 1


# ----------------------------------------------------------------------------
# Compiling


class CompilationFailed(Exception):
    """A compiler or disassembler failed; the message holds its words."""


@cache
def nvcc() -> Path:
    """The compiler that the build would use."""
    toolkit = SETUP.find_toolkit()
    if toolkit is None:
        raise FileNotFoundError("no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    return toolkit.root / "bin" / "nvcc"


@cache
def nvdisasm() -> Path:
    """The disassembler: the toolkit's, one in PATH, or that of the package on PyPI."""
    found = shutil.which("nvdisasm", path=os.pathsep.join([str(nvcc().parent), os.environ["PATH"]]))
    if found is None:
        try:
            files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = next((str(x.locate()) for x in files if x.name == "nvdisasm"), None)
    if found is None:
        raise FileNotFoundError(
            "no nvdisasm in the toolkit or PATH: pip install nvidia-cuda-nvdisasm"
        )
    return Path(found)


def compile_all(entries: Iterable[KernelEntry], arch: str) -> dict[str, Compiled]:
    """Compile kernels in parallel, as many at a time as MAX_JOBS says, or as there are cores.

    Args:
        entries: kernels of the table, or like them.
        arch: nvcc's name of the GPU, such as "sm_80".

    Returns:
        What came of each that is for that GPU, by its name.

    Raises:
        CompilationFailed: nvcc or nvdisasm failed.
    """
    entries = [entry for entry in entries if entry.arch == "sm80" or arch == "sm_90a"]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        GENERATE.generate(Path(folder), entries)
        compiled = pool.map(partial(compile_one, Path(folder), arch=arch), entries)
        return {entry.name: x for entry, x in zip(entries, compiled, strict=True)}


def compile_one(folder: Path, entry: KernelEntry, arch: str) -> Compiled:
    source, cubin = folder / f"{entry.name}.cu", folder / f"{entry.name}.cubin"
    wrapper = Path(__file__).with_name(f"one_{entry.arch}_kernel.cuh")
    said = output_of(
        *(nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin"),
        *("-I", ROOT / "csrc", "-include", wrapper),
        *(source, "-o", cubin),
    )
    code = output_of(nvdisasm(), "--print-code", cubin)
    return Compiled(read_ptxas(said), read_disassembly(code))


def output_of(*command: object) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise CompilationFailed(f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


# ----------------------------------------------------------------------------
# Judging


def faults(entry: KernelEntry, compiled: Compiled) -> list[str]:
    """Every limit that a kernel breaks, as a sentence; none if it is as it should be."""
    ptxas, found, allowed = compiled.ptxas, compiled.instructions, entry.allowed_spill_bytes
    faults = [f"ptxas warns: {warning}" for warning in ptxas.warnings]
    for what, size in (
        ("spill stores", ptxas.spill_stores),
        ("spill loads", ptxas.spill_loads),
        ("stack", ptxas.stack),
    ):
        if size > allowed:
            faults.append(f"{size} bytes of {what}, {allowed} are allowed")
    if found.local and not allowed:
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
    return [f"{entry.name}: {fault}" for fault in faults]


def all_faults(compiled: dict[str, Compiled]) -> list[str]:
    """The faults of all the kernels."""
    return [fault for name, x in compiled.items() for fault in faults(KERNELS[name], x)]


# ----------------------------------------------------------------------------
# Telling


def row(compiled: Compiled) -> dict[str, int]:
    """What the table and the JSON file tell about a kernel."""
    ptxas, count = compiled.ptxas, compiled.instructions
    return {
        "registers": ptxas.registers,
        "spill_stores": ptxas.spill_stores,
        "spill_loads": ptxas.spill_loads,
        "stack": ptxas.stack,
        "shared_bytes": compiled.shared_bytes,
        **{"instructions" if name == "total" else name: n for name, n in asdict(count).items()},
    }


def as_table(compiled: dict[str, Compiled]) -> str:
    """One line a kernel."""
    rows = {name: row(x) for name, x in compiled.items()}
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" ".join([f"{'kernel':{width}}", *columns])]
    for name, values in rows.items():
        cells = [f"{values[column]:{len(column)}}" for column in columns]
        lines.append(" ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def as_json(compiled: dict[str, Compiled], arch: str) -> str:
    """The same for programs, also with one line a kernel."""
    kernels = (f"    {json.dumps(name)}: {json.dumps(row(x))}" for name, x in compiled.items())
    version = SETUP.find_toolkit().version
    return (
        f'{{\n  "arch": "{arch}",\n  "nvcc": "{version}",\n  "kernels": {{\n'
        + ",\n".join(kernels)
        + "\n  }\n}\n"
    )


def main() -> None:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_80", help="as nvcc names it: sm_80, sm_90a, ...")
    parser.add_argument("--kernels", default="*", help="only those whose names fit, as in forward*")
    parser.add_argument("--out", type=Path, help="write kernel-registers-<arch>.json there")
    options = parser.parse_args()

    entries = [entry for entry in KERNELS.values() if fnmatchcase(entry.name, options.kernels)]
    if not entries:
        sys.exit(f"no kernel is called {options.kernels}; there are {', '.join(KERNELS)}")
    compiled = compile_all(entries, options.arch)
    if not compiled:
        sys.exit(f"no kernel that fits {options.kernels} is for {options.arch}")
    print(as_table(compiled))
    if options.out:
        path = options.out / f"kernel-registers-{options.arch}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(compiled, options.arch))
        print(f"wrote {path}")
    if found := all_faults(compiled):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
