"""The stages of a first contact, in order, and what each needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """A part of the run, in a process of its own.

    Attributes:
        name: of the stage.
        question: what the stage answers.
        limit: seconds after which the stage is stopped. Cases that have ended count.
        case_limit: seconds after which a single case counts as hanging.
        needs: cases of other stages, as "stage/case". If one has failed, the stage does not run.
        has_patterns: whether --cases chooses among its cases.
        under_sanitizer: whether compute-sanitizer runs the process.
        by_default: whether it runs if no stages are chosen.
        always: whether it runs even if others are chosen.
        package: of the module with its cases, which has the name of the stage.
    """

    name: str
    question: str
    limit: float
    case_limit: float
    needs: tuple[str, ...] = ()
    has_patterns: bool = True
    under_sanitizer: bool = False
    by_default: bool = True
    always: bool = False
    package: str = "benchmarks.first_contact"

    @property
    def module(self) -> str:
        """Where its cases are."""
        return f"{self.package}.{self.name}"

    def with_patience(self, factor: float) -> Stage:
        """With limits that are longer by a factor."""
        return replace(self, limit=self.limit * factor, case_limit=self.case_limit * factor)


_EXTENSION = ("build/extension",)

STAGES = [
    Stage("machine", "what is there?", 60, 40, has_patterns=False, always=True),
    Stage(
        *("build", "does it compile for this GPU?", 200, 180, ("machine/headers",)),
        has_patterns=False,
    ),
    Stage("smoke", "do the first launches work?", 45, 20, _EXTENSION),
    Stage("conformance", "is each instruction what the emulator says?", 60, 10, ("build/probes",)),
    Stage("kernels", "is each kernel right, against float64?", 120, 12, _EXTENSION),
    Stage("long_sequences", "and with more work than multiprocessors?", 90, 30, _EXTENSION),
    Stage("speed", "how fast is it, beside others?", 170, 45, _EXTENSION),
    Stage("memcheck", "does it stay within its memory?", 90, 45, _EXTENSION, under_sanitizer=True),
    Stage("compare", "which variants are faster?", 240, 120, _EXTENSION, by_default=False),
]


def chosen(
    stages: Sequence[Stage],
    names: Collection[str] | None = None,
    first: str | None = None,
    passed: Collection[str] = (),
) -> list[Stage]:
    """The stages to run, in order.

    Args:
        stages: all of them.
        names: only these; None is all that run by default.
        first: none before this one.
        passed: not these.
    """
    begin = 0 if first is None else [stage.name for stage in stages].index(first)

    def runs(index: int, stage: Stage) -> bool:
        wanted = stage.by_default if names is None else stage.name in names
        return wanted and index >= begin and stage.name not in passed

    return [stage for i, stage in enumerate(stages) if stage.always or runs(i, stage)]
