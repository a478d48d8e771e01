"""Registers that machine code must leave alone: those of products under way, those of other warps.

Tensor cores read and write the registers of a product (wgmma) until a wait says that they are done.
Meanwhile no instruction may touch its accumulators or write the fragment that it multiplies; only a
product with the same accumulators may follow, which waits for it. Products are under way in groups,
and a wait leaves the last few groups under way. All paths are followed, also back to the head of a
loop.

Warpgroups that reallocate registers (setmaxnreg) may use only as many as they then have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.compile_gate.control_flow import reachable, successors
from tests.compile_gate.sass import Instruction, Product, Program

# More groups under way than any kernel has. The oldest ones count as one group beyond that.
_MAX_GROUPS = 8

Group = frozenset[Product]


@dataclass(frozen=True)
class _UnderWay:
    """The groups of products under way, the oldest first, and the group that is being started."""

    groups: tuple[Group, ...] = ()
    started: Group = frozenset()

    def products(self) -> frozenset[Product]:
        return self.started.union(*self.groups)

    def after(self, instruction: Instruction) -> _UnderWay:
        product, pending = instruction.product, instruction.pending
        if product is not None:
            group = self.started | {product}
            if not product.commits:
                return _UnderWay(self.groups, group)
            groups = (*self.groups, group)
            oldest = groups[: 1 - _MAX_GROUPS]
            if len(oldest) > 1:
                groups = (frozenset().union(*oldest), *groups[1 - _MAX_GROUPS :])
            return _UnderWay(groups)
        if pending is not None:
            return _UnderWay(self.groups[max(len(self.groups) - pending, 0) :], self.started)
        return self


def hazards(program: Program) -> list[str]:
    """Every instruction that touches registers of products under way, as a sentence."""
    graph = successors(program)
    seen: set[tuple[int, _UnderWay]] = set()
    todo = [(0, _UnderWay())]
    found: dict[tuple[int, str], None] = {}
    while todo:
        position, under_way = todo.pop()
        if (position, under_way) in seen:
            continue
        seen.add((position, under_way))
        instruction = program.instructions[position]
        if under_way.groups or under_way.started:
            for conflict in _conflicts(instruction, under_way.products()):
                found[position, conflict] = None
        after = under_way.after(instruction)
        todo += [(x, after) for x in graph[position]]
    return [
        f"{program.instructions[position]} at {program.instructions[position].address:#x} "
        f"{conflict} of a product under way: a wait for products must come first"
        for position, conflict in sorted(found)
    ]


def _conflicts(instruction: Instruction, products: frozenset[Product]) -> Iterator[str]:
    own = instruction.product
    # A product waits for one with the same accumulators, but must not multiply them.
    accumulators = {x.accumulators for x in products}
    others = accumulators - {own.accumulators} if own else accumulators
    touched = instruction.touched & frozenset().union(*others)
    if own:
        touched |= own.fragment & frozenset().union(*accumulators)
    if touched:
        yield f"touches {_names(touched)}, accumulators"
    written = instruction.written & frozenset().union(*(x.fragment for x in products))
    if written:
        yield f"writes {_names(written)}, the left operand"


def _names(registers: frozenset[int]) -> str:
    first = [f"R{register}" for register in sorted(registers)[:4]]
    return ", ".join(first + ["..."] * (len(registers) > len(first)))


# ----------------------------------------------------------------------------
# Registers of a role


@dataclass(frozen=True)
class RegisterBudget:
    """A role: the registers of a thread after setmaxnreg, and how many its code names."""

    address: int  # of USETMAXREG
    registers: int
    used: int


def register_budgets(program: Program) -> list[RegisterBudget]:
    """The roles of a kernel that reallocates registers, in the order of the code."""
    graph = successors(program)
    found = []
    for position, instruction in enumerate(program.instructions):
        if instruction.name == "USETMAXREG":
            role = (program.instructions[x] for x in reachable(graph, position))
            highest = max((max(x.touched, default=-1) for x in role), default=-1)
            registers = int(instruction.operands.split(",")[-1], 16)
            found.append(RegisterBudget(instruction.address, registers, highest + 1))
    return found


def register_faults(program: Program) -> list[str]:
    """Every role that uses more registers than it has, as a sentence."""
    return [
        f"the code behind USETMAXREG at {x.address:#x} uses {x.used} registers, but a thread has "
        f"{x.registers} there"
        for x in register_budgets(program)
        if x.used > x.registers
    ]
