"""What the command line tells every stage."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """Options of the run.

    Attributes:
        out: the folder for results.
        rehearse: run on stand-ins on the CPU, at small sizes.
        cases: run only the cases whose names match one of these patterns, such as "*_d128_*".
        contenders: of the speed stage, by their names in benchmarks/contenders.py; empty is all.
        comparisons: of the compare stage, by name; empty is all.
        definitions: macros that nvcc defines in all kernels, such as "NAME=0".
        inject: stages in which a case hangs, crashes or fails on purpose, as ("hang", "smoke").
    """

    out: str
    rehearse: bool = False
    cases: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    comparisons: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()
    inject: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """The inverse of `as_json`."""
        values = json.loads(text)
        inject = tuple(map(tuple, values.pop("inject")))
        return Settings(
            inject=inject,
            **{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()},
        )
