"""What the loops of each sm90 kernel must be like: the goals of the compile gate, in one table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from jvp_attn.backends.kernel_table import KernelEntry
from tests.compile_gate.loop_report import LoopReport


@dataclass(frozen=True)
class ExpectedPhases:
    """The loops of a step. By default nothing is expected.

    Attributes:
        exposed: how many exponentials a warpgroup may compute while none of its own products is
            under way.
        turns: the head dims at which warpgroups take turns at the tensor cores.
        busy_percent: the least prediction of how long the tensor cores are busy, by head dim.
    """

    exposed: int | None = None
    turns: Collection[int] = ()
    busy_percent: Mapping[int, int] = field(default_factory=dict)


EXPECTED_PHASES = {
    # S of the next tile and O of this one are issued together; P is computed between the waits for
    # both.
    "forward": ExpectedPhases(
        exposed=0, turns=(64, 96, 128), busy_percent={64: 95, 96: 95, 128: 95, 256: 95}
    ),
    # The other warpgroup multiplies while one computes P: the registers are full of S and T.
    "forward_jvp": ExpectedPhases(turns=(64, 96, 128), busy_percent={64: 90, 96: 90, 128: 90}),
    "forward_jvp_q": ExpectedPhases(turns=(64, 96, 128), busy_percent={64: 85, 96: 90, 128: 90}),
    # P is computed while the products for T or P tV are under way.
    "tangent_only": ExpectedPhases(exposed=0, busy_percent={256: 90}),
    # P is computed while the products for dP are under way.
    "backward": ExpectedPhases(exposed=0),
    "backward_dkv": ExpectedPhases(exposed=0),
    # P is computed while the products for dP of this tile and dQ of the tile before are under way.
    "backward_dq": ExpectedPhases(
        exposed=0, turns=(64, 96, 128), busy_percent={64: 90, 96: 90, 128: 90}
    ),
    # The products for dP start as soon as their slot is full, after some of the exponentials.
    "jvp_backward_dq": ExpectedPhases(),
    # The other role multiplies while the warpgroup of the values computes P.
    "jvp_backward_dkv": ExpectedPhases(),
}

# How much longer than recorded a loop may be: the compiler may choose other registers, and a few
# instructions with them.
GROWTH_PERCENT = 5

# How many are described: one missing wait exposes hundreds of instructions.
MAX_HAZARDS = 3


def loop_faults(entry: KernelEntry, report: LoopReport) -> Iterator[str]:
    """Everything in the loops of a kernel that must not be, as sentences."""
    yield from report.hazards[:MAX_HAZARDS]
    if len(report.hazards) > MAX_HAZARDS:
        more = len(report.hazards) - MAX_HAZARDS
        yield f"{more} more instructions touch registers of products under way"
    yield from report.register_faults
    if entry.arch != "sm90" or entry.head_dim is None:
        return
    expected = EXPECTED_PHASES[entry.step]
    for role in report.roles:
        exposed = role.exposed
        if expected.exposed is not None and len(exposed) > expected.exposed:
            yield (
                f"in the loop at {role.address:#x}, {len(exposed)} of {role.exponentials} "
                f"exponentials are computed while no product of the same warpgroup is under way, "
                f"the first at {exposed[0]:#x}; at most {expected.exposed} may be"
            )
        if entry.head_dim in expected.turns and not role.turns:
            yield (
                f"the loop at {role.address:#x} has no barrier whose number depends on the "
                "warpgroup, but warpgroups should take turns at the tensor cores"
            )
    least = expected.busy_percent.get(entry.head_dim)
    if least is not None and (report.busy is None or round(100 * report.busy) < least):
        predicted = "nothing" if report.busy is None else f"{report.busy:.0%}"
        yield (
            f"the model predicts {predicted} for the time in which the tensor cores are busy; at "
            f"least {least}% is expected"
        )


def growth_faults(report: LoopReport, recorded: int | None) -> Iterator[str]:
    """Whether the loops have become longer than recorded, as a sentence."""
    instructions = sum(role.instructions for role in report.roles)
    if recorded is not None and instructions > recorded * (1 + GROWTH_PERCENT / 100):
        yield (
            f"an iteration takes {instructions} instructions on its ordinary path, more than "
            f"{GROWTH_PERCENT}% above the {recorded} of the recorded report: regenerate it with "
            "--out benchmarks/results if that is intended"
        )
