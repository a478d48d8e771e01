"""What the machine code of a kernel says about its loops over tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.compile_gate.control_flow import Role, roles
from tests.compile_gate.hazards import hazards, register_faults
from tests.compile_gate.overlap_model import Deadlock, busy_fraction
from tests.compile_gate.phases import (
    Barrier,
    Step,
    describe,
    event,
    exposed_exponentials,
    is_exponential,
    steps,
)
from tests.compile_gate.sass import Program


@dataclass(frozen=True)
class RoleReport:
    """One iteration of the loop of some warpgroups, on its ordinary path."""

    address: int
    instructions: int
    hgmma: int  # products
    mufu: int
    exponentials: int
    exposed: tuple[int, ...]  # addresses of exponentials beside no product of the same warpgroup
    turns: bool  # whether the warpgroups take turns at the tensor cores
    phases: tuple[str, ...]  # a line each

    @staticmethod
    def of(role: Role) -> RoleReport:
        names = Counter(x.name for x in role.path)
        return RoleReport(
            address=role.path[0].address,
            instructions=len(role.path),
            hgmma=names["HGMMA"],
            mufu=names["MUFU"],
            exponentials=sum(map(is_exponential, role.path)),
            exposed=tuple(x.address for x in exposed_exponentials(role.path)),
            turns=any(isinstance(x, Barrier) and x.is_turn for x in steps(role.path)),
            phases=tuple(describe(role.path)),
        )


@dataclass(frozen=True)
class LoopReport:
    """The loops of a kernel whose warpgroups multiply.

    Attributes:
        roles: the warpgroups that run different loops.
        hazards: instructions that touch registers of products under way, as sentences.
        register_faults: roles that use more registers than they have, as sentences.
        busy: the predicted part of the time in which the tensor cores work; None if the model does
            not understand the barriers.
    """

    roles: tuple[RoleReport, ...]
    hazards: tuple[str, ...] = ()
    register_faults: tuple[str, ...] = ()
    busy: float | None = None

    def numbers(self) -> dict[str, int | None]:
        """What the report of the compile gate records; sums over the roles."""
        exponentials = sum(x.exponentials for x in self.roles)
        return {
            "loop_instructions": sum(x.instructions for x in self.roles),
            "loop_hgmma": sum(x.hgmma for x in self.roles),
            "loop_mufu": sum(x.mufu for x in self.roles),
            "loop_exponentials": exponentials,
            "loop_overlapped": exponentials - sum(len(x.exposed) for x in self.roles),
            "busy_percent": None if self.busy is None else round(100 * self.busy),
        }


NO_LOOPS = LoopReport(())


def read_loops(program: Program, warpgroups: int) -> LoopReport:
    """Read the loops of a kernel.

    Args:
        program: the machine code.
        warpgroups: how many warpgroups run each of its loops.

    Raises:
        ValueError: it has an instruction or a loop that is not understood.
    """
    found = roles(program)
    return LoopReport(
        tuple(map(RoleReport.of, found)),
        tuple(hazards(program)),
        tuple(register_faults(program)),
        _busy(program, found, warpgroups),
    )


def _busy(program: Program, found: Sequence[Role], warpgroups: int) -> float | None:
    if not found:
        return None
    in_loops = frozenset().union(*(loop for role in found for loop in role.loops))
    arrivals: Counter[int] = Counter()
    for position, instruction in enumerate(program.instructions):
        if position in in_loops or instruction.name != "BAR" or "ARV" not in instruction.modifiers:
            continue
        barrier = event(instruction)
        if isinstance(barrier, Barrier) and barrier.number is not None:
            arrivals[barrier.number] += 1
    scripts: list[list[Step]] = [list(steps(role.path)) for role in found]
    try:
        return busy_fraction(scripts, warpgroups, arrivals)
    except Deadlock:
        return None
