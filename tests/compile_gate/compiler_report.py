"""Parses the report of ptxas on one compiled kernel, and counts its instructions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from tests.compile_gate.sass import Program


@dataclass(frozen=True)
class PtxasReport:
    """The report of `ptxas -v` on a file with one kernel. Sizes are in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    global_bytes: int  # of the file's variables
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Instructions:
    """The number of instructions of each kind in the machine code, each loop counted once."""

    total: int
    hmma: int = 0  # tensor core products of a warp
    ldgsts: int = 0  # asynchronous copies from global to shared memory
    mufu: int = 0  # exponentials, reciprocals and similar
    # Loads and stores of local memory: spilled registers, or arrays indexed at run time.
    local: int = 0
    hgmma: int = 0  # tensor core products of a warpgroup
    utmaldg: int = 0  # TMA loads
    usetmaxreg: int = 0  # register reallocations of warpgroups


# The report for each GPU starts with this line.
_START = re.compile(r"^(?=ptxas info\s*: \d+ bytes gmem)", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FUNCTION = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (\d+) registers")
_GLOBAL = re.compile(r"(\d+) bytes gmem")
# Advice on slow code counts too: "(C7510) Potential Performance Loss: wgmma ... serialized ...".
_WARNING = re.compile(
    r"^ptxas\b(?:.*\bwarning\s*: (?=\S)|\s*info\s*: (?=\(C\d+\)))(.*)$", re.MULTILINE
)


def read_ptxas(text: str, arch: str | None = None) -> PtxasReport:
    """Parse what nvcc prints with `-Xptxas -v`.

    Args:
        text: the output.
        arch: the GPU, such as "sm_80", whose report is meant if nvcc compiled for several. Warnings
            of all of them are kept.

    Raises:
        ValueError: the output does not describe exactly one kernel, or a function is not inlined.
    """
    warnings = tuple(_WARNING.findall(text))
    if arch is not None:
        reports = _START.split(text)
        text = "".join(report for report in reports if f"for '{arch}'\n" in report)
    entries, functions = _ENTRY.findall(text), _FUNCTION.findall(text)
    registers, global_bytes = _REGISTERS.findall(text), _GLOBAL.findall(text)
    if not len(entries) == len(functions) == len(registers) == len(global_bytes) == 1:
        raise ValueError(f"ptxas should describe one kernel, all of it inlined, but said:\n{text}")
    stack, spill_stores, spill_loads = (int(number) for number in functions[0])
    return PtxasReport(
        registers=int(registers[0]),
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        stack=stack,
        global_bytes=int(global_bytes[0]),
        warnings=warnings,
    )


def count_instructions(program: Program) -> Instructions:
    """Count the instructions of a kernel."""
    count = Counter(instruction.name for instruction in program.instructions)
    del count["NOP"]  # fills the last line of the instruction cache
    return Instructions(
        total=count.total(),
        hmma=count["HMMA"],
        ldgsts=count["LDGSTS"],
        mufu=count["MUFU"],
        local=count["LDL"] + count["STL"],
        hgmma=count["HGMMA"],
        utmaldg=count["UTMALDG"],
        usetmaxreg=count["USETMAXREG"],
    )
