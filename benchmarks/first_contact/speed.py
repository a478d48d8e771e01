"""Stage speed: TFLOP/s of all operations beside those of others, and of a matrix product.

The same measurement as benchmarks/attention_on_gpu.py, on the part of its grid that matters first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from attention_on_gpu import Problem, measure, print_row
from contenders import CONTENDERS, OPERATIONS

from benchmarks.first_contact.case import Case, Result, Wrong
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.target import Target, target_of

HEAD_DIMS = (128, 64)
SIZES = (4096, 16384)
REPEATS = 6
SMALL_MATMUL = 512  # of a rehearsal

Contenders = dict[str, tuple]


def cases(settings: Settings) -> Iterator[Case]:
    """Each operation, head dim and sequence length."""
    target, contenders = target_of(settings), chosen(settings.contenders)
    for operation in OPERATIONS:
        for head_dim in HEAD_DIMS:
            for size in SIZES:
                problem = problem_of(target, operation, head_dim, size)
                yield Case(
                    f"{operation}, d{head_dim}, {size}",
                    partial(timed, target, problem, contenders),
                    {"problem": asdict(problem), "seed": 0},
                )


class Small(Problem):
    """A problem of a rehearsal: one sequence."""

    @property
    def batch(self) -> int:
        return 1

    @property
    def heads(self) -> int:
        return 2


def problem_of(target: Target, operation: str, head_dim: int, size: int) -> Problem:
    """Without a mask."""
    kind = Problem if target.is_gpu else Small
    return kind(operation, "full", head_dim, target.scaled(size))


def chosen(names: tuple[str, ...]) -> Contenders:
    """The contenders of these names; all if there are none.

    Raises:
        ValueError: there is no such contender.
    """
    if unknown := set(names) - CONTENDERS.keys():
        raise ValueError(f"there is no contender {unknown}; there are {', '.join(CONTENDERS)}")
    return {name: CONTENDERS[name] for name in names or CONTENDERS}


def timed(target: Target, problem: Problem, contenders: Contenders) -> Result:
    """Time the contenders in turn; the row of a result file."""
    matmul = {} if target.is_gpu else {"matmul": SMALL_MATMUL}
    row = measure(problem, target.device, REPEATS, contenders=contenders, **matmul)
    print_row(row)
    if reason := row["missing"].get("jvp_attn"):
        raise Wrong(f"jvp_attn is not timed: {reason}", row)
    return {**row, "repeats": REPEATS}
