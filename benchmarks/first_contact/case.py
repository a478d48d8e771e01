"""A case: what the module of a stage consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Result = Mapping[str, Any] | None


class LeftOut(Exception):
    """This machine cannot run the case; the text says why."""


class Wrong(Exception):
    """A case has failed, and its result is worth keeping."""

    def __init__(self, why: str, result: Result) -> None:
        super().__init__(why)
        self.result = result


@dataclass(frozen=True)
class Case:
    """A part of a stage.

    Attributes:
        name: within the stage.
        run: computes the result, for the journal; raises if it is wrong.
        inputs: what determines the inputs, so that a failure can be reproduced.
        group: if a case hangs, crashes or makes the GPU unusable, the others of its group are left
            out, since each would cost another process.
    """

    name: str
    run: Callable[[], Result]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
