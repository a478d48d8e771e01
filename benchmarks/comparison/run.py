"""One training run of the comparison, by the options of `python -m rcm.train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one method and seed; it is made once, and its result is kept."""

    name: str
    """STUDY/PRESET/what/seed: the name of its folder and of its result."""
    preset: str
    method: str
    seed: int
    options: tuple[str, ...] = ()
    """Further options of rcm.train."""
    teacher: Run | None = None
    """The run whose teacher it takes; without one it trains a teacher."""
    start: Run | None = None
    """The run whose student it starts from."""
    evaluation: tuple[str, ...] = ()
    """Further options of rcm.evaluate."""

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs whose weights it takes."""
        return tuple(run for run in (self.teacher, self.start) if run is not None)

    @property
    def what(self) -> str:
        """Of the name: the method, or what differs within the study."""
        return self.name.split("/")[2]

    @property
    def iterations(self) -> int:
        """The student's iterations by its options, of which every run has this one."""
        return int(self.options[self.options.index("--student.iterations") + 1])

    def training_key(self) -> dict[str, Any]:
        """What its weights depend on, to notice a folder of other settings."""
        return {
            "preset": self.preset,
            "method": self.method,
            "seed": self.seed,
            "options": list(self.options),
            "teacher": None if self.teacher is None else self.teacher.training_key(),
            "start": None if self.start is None else self.start.training_key(),
        }

    def key(self) -> dict[str, Any]:
        """What its result depends on, to notice a result of other settings."""
        return {**self.training_key(), "evaluation": list(self.evaluation)}
