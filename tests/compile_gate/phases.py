"""The phases of a loop over tiles: products, waits for them, barriers, and arithmetic in between.

Arithmetic is counted by what limits it, for one warp on one of the four schedulers of a
multiprocessor: every instruction takes an issue slot, one cycle. Exponentials and conversions of
integers take another unit for 8 cycles; comparisons, logic, shifts and integer sums take another
for 2 (CUDA Programming Guide, throughput of native arithmetic instructions, compute capability
9.0: 128, 16 and 64 results a cycle and multiprocessor).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.compile_gate.sass import Instruction, Product

_SPECIAL_FUNCTIONS = {"MUFU", "I2F", "F2I"}
_HALF_RATE = {
    *("F2FP", "FMNMX", "FSEL", "FSET", "FSETP", "I2FP", "IABS", "IADD3", "IMNMX", "ISETP"),
    *("LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SHF", "VIADD", "VIADDMNMX", "VIMNMX"),
}
_WARPGROUP_THREADS = 128


@dataclass(frozen=True)
class Work:
    """Arithmetic of one warp: how many instructions each unit issues."""

    issue: int = 0
    half_rate: int = 0
    special: int = 0  # exponentials and other special functions

    def __add__(self, other: Work) -> Work:
        return Work(
            self.issue + other.issue,
            self.half_rate + other.half_rate,
            self.special + other.special,
        )


@dataclass(frozen=True)
class Wait:
    """A wait for all products but those of the last `pending` groups."""

    pending: int


@dataclass(frozen=True)
class Barrier:
    """A named barrier of some warpgroups.

    Attributes:
        number: of the barrier; None if it is in a register, that is, depends on the warpgroup.
        warpgroups: how many arrive before it opens.
        waits: whether this warpgroup waits, or only arrives.
    """

    number: int | None
    warpgroups: int
    waits: bool

    @property
    def is_turn(self) -> bool:
        """Whether warpgroups take turns there: each waits for the one before it."""
        return self.number is None and self.warpgroups > 1


Step = Product | Wait | Barrier | Work


def steps(path: Iterable[Instruction]) -> Iterator[Step]:
    """The phases of a path. HGMMA takes an issue slot too."""
    work = Work()
    for instruction in path:
        work += _work(instruction)
        step = event(instruction)
        if step is not None:
            yield work
            yield step
            work = Work()
    yield work


def _work(instruction: Instruction) -> Work:
    name = instruction.name
    return Work(1, int(name in _HALF_RATE), int(name in _SPECIAL_FUNCTIONS))


def event(instruction: Instruction) -> Product | Wait | Barrier | None:
    """The step that it is, if it is not arithmetic."""
    if instruction.pending is not None:
        return Wait(instruction.pending)
    if instruction.name == "BAR":
        number, *threads = (word.strip() for word in instruction.operands.split(","))
        if not threads:
            raise ValueError(f"{instruction} in a loop over tiles stops the whole block")
        return Barrier(
            int(number, 16) if number.startswith("0x") else None,
            int(threads[0], 16) // _WARPGROUP_THREADS,
            waits="ARV" not in instruction.modifiers,
        )
    return instruction.product


def tensor_cycles(path: Iterable[Instruction]) -> int:
    """Cycles that the products of a warpgroup take on the tensor cores."""
    return sum(x.product.cycles for x in path if x.product)


def is_exponential(instruction: Instruction) -> bool:
    """Whether it computes a power of 2."""
    return instruction.name == "MUFU" and "EX2" in instruction.modifiers


def exposed_exponentials(path: Sequence[Instruction]) -> list[Instruction]:
    """The exponentials that a warpgroup computes while none of its own products is under way.

    The path is that of a loop: what is under way at its end is so at its start.
    """
    groups, started = 0, False
    found: list[Instruction] = []
    for _ in range(2):  # the first time finds what is under way at the start
        found.clear()
        for instruction in path:
            if instruction.product:
                started = not instruction.product.commits
                groups += instruction.product.commits
            elif instruction.pending is not None:
                groups = min(groups, instruction.pending)
            if is_exponential(instruction) and not groups and not started:
                found.append(instruction)
    return found


def describe(path: Iterable[Instruction]) -> list[str]:
    """A line for each phase: products with their tensor cycles, waits, barriers, arithmetic."""
    lines: list[str] = []
    products: list[Instruction] = []
    between, work = Work(), Work()  # among the products, and since the last of them

    def end_phase() -> None:
        nonlocal products, between, work
        if products:
            among = f"; {_words(between)} among them" if between.issue else ""
            lines.append(
                f"{products[0].address:#07x} {len(products)} x {_kind(products[0])}: "
                f"{tensor_cycles(products)} cycles of the tensor cores{among}"
            )
        if work.issue:
            lines.append(f"          {_words(work)}")
        products, between, work = [], Work(), Work()

    for instruction in path:
        if instruction.product:
            if products and _kind(products[0]) == _kind(instruction):
                between, work = between + work, Work()
            else:
                end_phase()
            products.append(instruction)
        elif event(instruction):
            end_phase()
            lines.append(f"{instruction.address:#07x} {instruction}")
        else:
            work += _work(instruction)
    end_phase()
    return lines


def _kind(hgmma: Instruction) -> str:
    return f"HGMMA{hgmma.modifiers} {hgmma.operands.split(',')[0]}"


def _words(work: Work) -> str:
    return f"{work.issue} issue slots, {work.special} special functions"
