"""Reads machine code (SASS): what `nvdisasm --print-code` prints about one kernel.

An instruction is printed as "/*01d0*/  @!P0 BRA `(.L_x_0) ;". HGMMA is one product of a warpgroup
(wgmma): 64 x n accumulators in float32, n/2 registers of each thread, and a left operand in shared
memory or in four registers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(
    r"^(?P<label>[.$][\w.$]+):"
    r"|^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+)?\s*"
    r"(?P<name>[A-Z]\w*)(?P<modifiers>[.\w]*)\s*(?P<operands>[^;]*?)\s*;",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?")

# Instructions whose first operand is a register that they do not write.
_NO_RESULT = {"BAR", "CALL", "NANOSLEEP", "R2P", "RET", "WARPSYNC"}
# Instructions whose result may follow a predicate.
_RESULT_AFTER_PREDICATE = {"ATOM", "ATOMG", "ATOMS", "LOP3", "MATCH", "SHFL", "VOTE"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: "@!P0 BRA.DIV UR4, `(.L_x_9)" has the name BRA and the modifiers .DIV."""

    address: int
    predicate: str  # "@!P0", or "" if it always takes effect
    name: str
    modifiers: str
    operands: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name + self.modifiers, self.operands)))

    @property
    def target(self) -> str | None:
        """The label that it names."""
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @cached_property
    def product(self) -> Product | None:
        """The product that it starts, if it is HGMMA."""
        return Product.of(self) if self.name == "HGMMA" else None

    @property
    def pending(self) -> int | None:
        """How many groups of products may stay under way, if it is a wait for products."""
        if self.name != "WARPGROUP" or "DEPBAR" not in self.modifiers:
            return None
        return int(self.operands.split(",")[1], 16)

    @cached_property
    def touched(self) -> frozenset[int]:
        """The registers that it reads or writes."""
        if self.product:
            return self.product.accumulators | self.product.fragment
        words = self._operands
        data = {x for i, word in enumerate(words) for x in self._registers(i, word, len(words))}
        return frozenset(data)

    @cached_property
    def written(self) -> frozenset[int]:
        """The registers that it writes."""
        if self.product:
            return self.product.accumulators
        words = self._operands
        first = 0
        if self.name in _RESULT_AFTER_PREDICATE and re.match(r"!?U?P", words[0]):
            first = 1
        is_register = first < len(words) and re.match(r"R\d", words[first])
        if self.name in _NO_RESULT or not is_register:
            return frozenset()
        return frozenset(self._registers(0, words[first], len(words)))

    @property
    def _operands(self) -> list[str]:
        return [word.strip() for word in self.operands.split(",")]

    def _registers(self, position: int, operand: str, count: int) -> list[int]:
        """Those of an operand: several in a row where it is wider than 32 bits."""
        parts = self.modifiers.split(".")
        width = 1
        if "WIDE" in parts:  # the product and the addend
            width = 2 if position in (0, count - 1) else 1
        elif {"128", "4", "F32x4"} & {*parts}:
            width = 4
        elif {"64", "2"} & {*parts} or (self.name == "CS2R" and "32" not in parts):
            width = 2
        found: list[int] = []
        for register, pair in _REGISTER.findall(operand):
            size = 2 if pair else 1 if "[" in operand else width
            found += range(int(register), int(register) + size)
        return found


@dataclass(frozen=True)
class Product:
    """A product of a warpgroup: 64 x 16 by 16 x columns."""

    columns: int
    accumulators: frozenset[int]
    fragment: frozenset[int]  # the registers of the left operand, if it is not in shared memory
    commits: bool  # it is the last of its group

    @property
    def cycles(self) -> int:
        """How long the tensor cores take."""
        return self.columns // 2

    @staticmethod
    def of(hgmma: Instruction) -> Product:
        shape = re.match(r"\.64x(\d+)x16\.F32\b", hgmma.modifiers)
        registers = re.match(r"R(\d+), (?:R(\d+), )?gdesc", hgmma.operands)
        if not shape or not registers:
            raise ValueError(
                f"{hgmma} is not a product of 16-bit elements in float32, the only one that is read"
            )
        columns, first, left = int(shape[1]), int(registers[1]), registers[2]
        return Product(
            columns,
            frozenset(range(first, first + columns // 2)),
            frozenset(range(int(left), int(left) + 4)) if left else frozenset(),
            commits="gsb0" in hgmma.operands,
        )


@dataclass(frozen=True)
class Program:
    """The machine code of one kernel. A label names the position of the instruction behind it."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


def parse(text: str) -> Program:
    """Read the output of `nvdisasm --print-code`.

    Raises:
        ValueError: the output has no instruction.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _LINE.finditer(text):
        if line["label"]:
            labels[line["label"]] = len(instructions)
        else:
            instructions.append(
                Instruction(
                    int(line["address"], 16),
                    line["predicate"] or "",
                    line["name"],
                    line["modifiers"],
                    line["operands"],
                )
            )
    if not instructions:
        raise ValueError(f"there is no instruction in the disassembly:\n{text[:2000]}")
    return Program(tuple(instructions), labels)
