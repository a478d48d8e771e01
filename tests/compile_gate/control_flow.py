"""Control flow of a kernel: its loops over tiles, and the ordinary path through each.

A loop is a set of instructions of which each reaches each other. An innermost loop with products
is a loop over tiles. Loops over tiles in one loop around them, the persistent loop over work tiles,
are run by the same warpgroups: they are one role, such as the producer, or the warpgroups that
compute dK.

The ordinary path of a role is one iteration for a tile in which nothing unusual happens. Branches
for unusual tiles, such as masked ones, scores too large for one FFMA, or a tile that has not
arrived yet, only add instructions. So the ordinary path is the shortest of those that do all the
work: among the paths from the head of the loop back to it, those with the most products, barriers
and stores to global memory; among these the one with the fewest instructions. If a role has several
loops, such as one for masked tiles, its ordinary loop has the fewest instructions for each cycle of
the tensor cores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tests.compile_gate.sass import Instruction, Program

# The work of a loop, which every ordinary iteration does.
WORK = {"HGMMA", "BAR", "STG", "REDG", "RED", "ATOMG"}

_UNKNOWN = {"BRX", "BRXU", "JMP", "JMX", "JMXU", "BREAK", "LEPC"}

Graph = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Role:
    """The loops over tiles that the same warpgroups run.

    Attributes:
        path: the ordinary path through one iteration of the ordinary loop.
        loops: the positions of the instructions of every loop, the ordinary one first.
    """

    path: tuple[Instruction, ...]
    loops: tuple[frozenset[int], ...]


def successors(program: Program) -> Graph:
    """Where each instruction may go on, as positions.

    Raises:
        ValueError: an instruction jumps to a place that is known only at run time.
    """
    return {i: _next(program, i) for i in range(len(program.instructions))}


def _next(program: Program, position: int) -> list[int]:
    instruction = program.instructions[position]
    if instruction.name in _UNKNOWN:
        raise ValueError(f"the control flow of {instruction} is not known")
    after = [position + 1] if position + 1 < len(program.instructions) else []
    if instruction.name == "EXIT":
        return after if instruction.predicate else []
    if instruction.name == "RET":  # the call goes on with the next instruction
        return []
    if instruction.name not in ("BRA", "CALL") or instruction.target is None:
        return after
    target = [program.labels[instruction.target]]
    always = not instruction.predicate and instruction.operands == f"`({instruction.target})"
    if instruction.name == "BRA" and always and not instruction.modifiers:
        return target
    return [*target, *after]


def reachable(graph: Graph, start: int) -> set[int]:
    """The positions that can follow a position, which is one of them."""
    seen, todo = set(), [start]
    while todo:
        position = todo.pop()
        if position not in seen:
            seen.add(position)
            todo += graph[position]
    return seen


def roles(program: Program) -> list[Role]:
    """The roles that multiply, in the order of the code.

    Raises:
        ValueError: a loop over tiles has several heads.
    """
    graph = successors(program)
    products = {i for i, x in enumerate(program.instructions) if x.name == "HGMMA"}
    found = []
    for outermost in _loops(graph, graph.keys()):
        innermost = _innermost(graph, outermost, products)
        if innermost:
            paths = {loop: _ordinary_path(program, graph, loop) for loop in innermost}
            ordered = sorted(innermost, key=lambda loop: _slowness(paths[loop]))
            found.append(Role(paths[ordered[0]], tuple(ordered)))
    return sorted(found, key=lambda role: role.path[0].address)


def _slowness(path: Sequence[Instruction]) -> float:
    """Instructions for each cycle of the tensor cores."""
    return len(path) / sum(x.product.cycles for x in path if x.product)


def _loops(graph: Graph, positions: Collection[int]) -> list[frozenset[int]]:
    """The outermost loops among some positions: strongly connected components (Tarjan, 1972)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_: list[int] = []
    is_open: set[int] = set()
    found = []
    for start in positions:
        if start in index:
            continue
        todo = [(start, iter(graph[start]))]
        index[start] = low[start] = len(index)
        open_.append(start)
        is_open.add(start)
        while todo:
            position, following = todo[-1]
            for after in following:
                if after not in positions:
                    continue
                if after not in index:
                    index[after] = low[after] = len(index)
                    open_.append(after)
                    is_open.add(after)
                    todo.append((after, iter(graph[after])))
                    break
                if after in is_open:
                    low[position] = min(low[position], index[after])
            else:
                todo.pop()
                if todo:
                    before = todo[-1][0]
                    low[before] = min(low[before], low[position])
                if low[position] == index[position]:
                    at = open_.index(position)
                    component, open_[at:] = frozenset(open_[at:]), []
                    is_open -= component
                    if len(component) > 1 or position in graph[position]:
                        found.append(component)
    return found


def _innermost(graph: Graph, loop: frozenset[int], products: set[int]) -> list[frozenset[int]]:
    """The innermost loops with products in a loop, which may be itself."""
    if not loop & products:
        return []
    head = _head(graph, loop)
    inner = _loops(graph, loop - {head})
    return [x for each in inner for x in _innermost(graph, each, products)] or [loop]


def _head(graph: Graph, loop: frozenset[int]) -> int:
    """Where a loop is entered."""
    entries = {x for i, after in graph.items() if i not in loop for x in after if x in loop}
    entries |= loop & {0}
    if len(entries) != 1:
        raise ValueError(f"a loop is entered at {len(entries)} instructions: {sorted(entries)}")
    return entries.pop()


def _ordinary_path(program: Program, graph: Graph, loop: frozenset[int]) -> tuple[Instruction, ...]:
    head = _head(graph, loop)
    # The positions such that what follows one, other than by going back, is before it.
    order: list[int] = []
    state: dict[int, bool] = {head: True}  # whether it is still on the way
    forward: dict[int, list[int]] = {head: []}
    todo = [(head, iter(graph[head]))]
    while todo:
        position, following = todo[-1]
        for after in following:
            if after not in loop or state.get(after, False):
                continue  # leaves the loop, goes back to its head, or waits in a loop within
            forward[position].append(after)
            if after not in state:
                state[after], forward[after] = True, []
                todo.append((after, iter(graph[after])))
                break
        else:
            todo.pop()
            state[position] = False
            order.append(position)

    # The work and the negative number of instructions from a position to the end, and what follows.
    best: dict[int, tuple[int, int, int | None]] = {}
    for position in order:
        ends = [(0, 0, None)] if head in graph[position] else []
        ways = [(*best[x][:2], x) for x in forward[position] if x in best]
        candidates = [*ends, *ways]
        if candidates:
            work, length, way = max(candidates, key=lambda candidate: candidate[:2])
            does_work = program.instructions[position].name in WORK
            best[position] = (work + does_work, length - 1, way)
    path: list[Instruction] = []
    at: int | None = head
    while at is not None:
        path.append(program.instructions[at])
        at = best[at][2]
    return tuple(path)
