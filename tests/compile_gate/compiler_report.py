"""What ptxas and nvdisasm say about one compiled kernel, read from their own words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class PtxasReport:
    """What `ptxas -v` prints for a file that holds one kernel. Sizes are in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    global_bytes: int  # of the file's variables
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Instructions:
    """How many instructions of each kind the machine code has, loops counted once."""

    total: int
    hmma: int  # tensor core products
    ldgsts: int  # asynchronous copies from global to shared memory
    mufu: int  # exponentials, reciprocals and their like
    local: int  # loads and stores of local memory: spilled registers, or arrays indexed at run time


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FUNCTION = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (\d+) registers")
_GLOBAL = re.compile(r"(\d+) bytes gmem")
_WARNING = re.compile(r"^ptxas\b.*\bwarning\s*: (.*)$", re.MULTILINE)

# "/*01d0*/  @!P0 BRA ..." is what nvdisasm and cuobjdump make of an instruction.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)


def read_ptxas(text: str) -> PtxasReport:
    """Read what nvcc prints with `-Xptxas -v`.

    Raises:
        ValueError: it does not describe exactly one kernel; functions that are called count too.
    """
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
        warnings=tuple(_WARNING.findall(text)),
    )


def read_disassembly(text: str) -> Instructions:
    """Count the instructions in what `nvdisasm --print-code` prints.

    Raises:
        ValueError: there is no instruction in it.
    """
    count = Counter(_INSTRUCTION.findall(text))
    del count["NOP"]  # fills the last line of the instruction cache
    if not count:
        raise ValueError(f"there is no instruction in the disassembly:\n{text[:2000]}")
    return Instructions(
        total=count.total(),
        hmma=count["HMMA"],
        ldgsts=count["LDGSTS"],
        mufu=count["MUFU"],
        local=count["LDL"] + count["STL"],
    )
