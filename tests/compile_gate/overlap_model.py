"""Predicts which part of the time the tensor cores are busy, from the phases of the loops.

This is a prediction, within about 10 percentage points; no GPU has been measured. The warpgroups of
a block share the tensor cores and the units that arithmetic needs. The model knows

- the tensor cores: one product at a time; those of different warpgroups alternate;
- arithmetic: issue slots, the unit for comparisons and integers and that for exponentials, each
  shared evenly by the warpgroups that compute;
- waits for products, and named barriers.

It knows no latencies, which make it too high rather than too low, no memory, and neither the first
nor the last tiles of a block. How many products of a warpgroup may wait for the tensor cores before
its next instruction must wait too is not documented: the model assumes one, then any number, and
returns the lower prediction, each the average over several distances between the starts of the
warpgroups.

Where the number of a barrier depends on the warpgroup, warpgroups take turns: each waits for its
turn, and the next one gets it once the last product before its end has started.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.compile_gate.phases import Barrier, Step, Wait, Work
from tests.compile_gate.sass import Product

# Cycles of an instruction on each unit, for the warp that a warpgroup has on each scheduler.
ISSUE_CYCLES, HALF_RATE_CYCLES, SPECIAL_CYCLES = 1, 2, 8

QUEUES = (1, math.inf)  # how many products of a warpgroup may wait
DISTANCES = 8
WARM_UP, MEASURED = 4, 12  # iterations

_EPSILON = 1e-6  # cycles


class Deadlock(Exception):
    """No warpgroup can go on: the model does not understand the barriers of the kernel."""


def busy_fraction(
    roles: Sequence[Sequence[Step]], warpgroups: int, arrivals: Mapping[int, int]
) -> float:
    """The part of the time in which the tensor cores work.

    Args:
        roles: the steps of one iteration of each role.
        warpgroups: how many warpgroups have each role.
        arrivals: how many warpgroups have arrived at each named barrier before the loops start.

    Raises:
        Deadlock: the barriers cannot be understood.
    """
    scripts = [_from_turn(steps) for steps in roles for _ in range(warpgroups)]
    distance = max(map(_duration, scripts)) / DISTANCES

    def predict(queue: float) -> float:
        blocks = (_Block(scripts, arrivals, distance * i, queue) for i in range(DISTANCES))
        return sum(block.run() for block in blocks) / DISTANCES

    return min(map(predict, QUEUES))


def _from_turn(steps: Sequence[Step]) -> Sequence[Step]:
    """The same loop, from where a warpgroup waits for its turn: there, none has products."""
    for i, step in enumerate(steps):
        if isinstance(step, Barrier) and step.is_turn and step.waits:
            return [*steps[i:], *steps[:i]]
    return steps


def _duration(steps: Sequence[Step]) -> float:
    """Cycles of an iteration if nothing overlaps."""
    cycles = (x.cycles for x in steps if isinstance(x, Product))
    return sum(cycles) + sum(max(_cycles(x)) for x in steps if isinstance(x, Work))


def _cycles(work: Work) -> list[float]:
    """Cycles on each unit."""
    return [
        work.issue * ISSUE_CYCLES,
        work.half_rate * HALF_RATE_CYCLES,
        work.special * SPECIAL_CYCLES,
    ]


@dataclass(eq=False)
class _Warpgroup:
    steps: Sequence[Step]
    start: float
    at: int = 0
    iterations: int = 0
    work: list[float] = field(default_factory=list)  # cycles left on each unit
    # Products, by cycles and group, and the ends of turns.
    queue: deque[tuple[float, int] | None] = field(default_factory=deque)
    unfinished: Counter[int] = field(default_factory=Counter)  # products of each group
    group: int = 0  # the one that is being started
    has_turn: int = 0
    opened: int | None = None  # while it waits at a barrier: how often that had opened before


class _Block:
    """The warpgroups of a block, which start `distance` cycles after one another.

    At most `queue` products of each may wait for the tensor cores.
    """

    def __init__(
        self,
        scripts: Sequence[Sequence[Step]],
        arrivals: Mapping[int, int],
        distance: float,
        queue: float,
    ) -> None:
        self.queue = queue
        self.warpgroups = [_Warpgroup(steps, i * distance) for i, steps in enumerate(scripts)]
        self.warpgroups[0].has_turn = 1
        self.arrived = Counter(arrivals)
        self.opened: Counter[int] = Counter()
        self.time = self.busy = 0.0
        # What the tensor cores do: whose product, its group and the cycles that are left.
        self.owner: _Warpgroup | None = None
        self.group = 0
        self.left = 0.0
        self.order = [*self.warpgroups]  # in which they get the tensor cores

    def run(self) -> float:
        started = None
        while True:
            while any(self._take_step(x) for x in self.warpgroups) or self._start_product():
                pass
            done = min(x.iterations for x in self.warpgroups)
            if started is None and done >= WARM_UP:
                started = self.time, self.busy
            if started is not None and done >= WARM_UP + MEASURED:
                return (self.busy - started[1]) / (self.time - started[0])
            self._advance()

    def _take_step(self, warpgroup: _Warpgroup) -> bool:
        """Take the next step, which takes no time or starts work; False if it must wait."""
        if warpgroup.start > self.time + _EPSILON or warpgroup.work:
            return False
        step = warpgroup.steps[warpgroup.at]
        if isinstance(step, Product):
            if sum(x is not None for x in warpgroup.queue) >= self.queue:
                return False
            warpgroup.queue.append((step.cycles, warpgroup.group))
            warpgroup.unfinished[warpgroup.group] += 1
            warpgroup.group += step.commits
        elif isinstance(step, Work):
            warpgroup.work = _cycles(step) if step.issue else []
        elif not self._may_pass(warpgroup, step):
            return False
        warpgroup.at = (warpgroup.at + 1) % len(warpgroup.steps)
        warpgroup.iterations += warpgroup.at == 0
        return True

    def _may_pass(self, warpgroup: _Warpgroup, step: Wait | Barrier) -> bool:
        if isinstance(step, Wait):
            first = warpgroup.group - step.pending
            return all(group >= first for group in warpgroup.unfinished)
        if step.is_turn:
            if step.waits:
                return self._take_turn(warpgroup)
            warpgroup.queue.append(None)
            self._end_turns(warpgroup)
            return True
        if step.number is None or step.warpgroups == 1:
            return True
        return self._meet(warpgroup, step, step.number)

    def _take_turn(self, warpgroup: _Warpgroup) -> bool:
        had_turn = warpgroup.has_turn > 0
        warpgroup.has_turn -= had_turn
        return had_turn

    def _end_turns(self, warpgroup: _Warpgroup) -> None:
        """Pass turns on that have no more products to start."""
        while warpgroup.queue and warpgroup.queue[0] is None:
            warpgroup.queue.popleft()
            following = self.warpgroups.index(warpgroup) + 1
            self.warpgroups[following % len(self.warpgroups)].has_turn += 1

    def _meet(self, warpgroup: _Warpgroup, barrier: Barrier, number: int) -> bool:
        if warpgroup.opened is not None:  # it has arrived and waits
            if self.opened[number] == warpgroup.opened:
                return False
            warpgroup.opened = None
            return True
        self.arrived[number] += 1
        if self.arrived[number] == barrier.warpgroups:
            self.arrived[number] = 0
            self.opened[number] += 1
        elif barrier.waits:
            warpgroup.opened = self.opened[number]
            return False
        return True

    def _start_product(self) -> bool:
        if self.owner:
            return False
        for warpgroup in self.order:
            if warpgroup.queue:
                product = warpgroup.queue.popleft()
                assert product, "the end of a turn is passed on as soon as it comes first"
                self.left, self.group = product
                self.owner = warpgroup
                self._end_turns(warpgroup)
                # The others come first next time.
                self.order.remove(warpgroup)
                self.order.append(warpgroup)
                return True
        return False

    def _advance(self) -> None:
        """Let time go by until something ends."""
        working = [x for x in self.warpgroups if x.work]
        users = [sum(x.work[unit] > 0 for x in working) for unit in range(3)]
        ends = [x.start - self.time for x in self.warpgroups if x.start > self.time + _EPSILON]
        ends += [x.work[unit] * users[unit] for x in working for unit in range(3) if x.work[unit]]
        ends += [self.left] if self.owner else []
        if not ends:
            raise Deadlock
        passed = min(ends)
        self.time += passed
        for warpgroup in working:
            left = [x - passed / max(n, 1) for x, n in zip(warpgroup.work, users, strict=True)]
            left = [x if x > _EPSILON else 0 for x in left]
            warpgroup.work = left if any(left) else []
        if self.owner:
            self.busy += passed
            self.left -= passed
            if self.left <= _EPSILON:
                unfinished = self.owner.unfinished
                unfinished[self.group] -= 1
                if not unfinished[self.group]:
                    del unfinished[self.group]
                self.owner = None
