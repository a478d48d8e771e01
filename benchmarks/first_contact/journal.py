"""The journal of a run: one line of JSON for each case that begins and for each that ends.

A line is on disk before the case goes on, so that it survives a crash, and a run that is killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PASSED = "passed"
FAILED = "failed"
CRASHED = "crashed"
HUNG = "hung"
STOPPED = "stopped"  # at the limit of its stage
LEFT_OUT = "left out"  # this machine cannot run it
BAD = (FAILED, CRASHED, HUNG, STOPPED)


class Journal:
    """The file `journal.jsonl`.

    A record has the name of its stage and case. The first of a case holds its inputs; the last has
    `status`, `seconds`, and `error` or `result`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, stage: str, case: str, **facts: Any) -> None:
        """Append a record."""
        line = json.dumps({"stage": stage, "case": case, **facts}, default=str)
        with self._path.open("a") as file:
            file.write("\n" + line)  # begins on a line of its own, even after one that was cut off

    def read(self) -> list[Record]:
        """All records. A line that was cut off when its writer was killed is no record."""
        if not self._path.exists():
            return []
        records = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def size(self) -> int:
        """In bytes. It changes when a case begins or ends."""
        return self._path.stat().st_size if self._path.exists() else 0

    def ended(self, stage: str | None = None) -> list[Record]:
        """The last records of the cases that have ended: of one stage, or of all."""
        return [x for x in self.read() if "status" in x and stage in (None, x["stage"])]

    def open_case(self, stage: str) -> Record | None:
        """The first record of the case that has begun and not ended."""
        records = [x for x in self.read() if x["stage"] == stage]
        return None if not records or "status" in records[-1] else records[-1]

    def restart(self, *, keep_passed: bool) -> None:
        """Begin anew, or keep the cases that have passed."""
        kept = [x for x in self.ended() if keep_passed and x["status"] == PASSED]
        self._path.write_text("\n".join(json.dumps(x) for x in kept))


def counts(records: list[Record]) -> Mapping[str, int]:
    """How many cases ended with each status."""
    statuses = [x["status"] for x in records]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}
