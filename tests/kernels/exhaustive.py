"""Decides which of the exhaustive kernel tests run; as a script, runs all of them.

    python -m tests.kernels.exhaustive

The tests marked `exhaustive` (all pairs of settings, every diagonal, …) take seven minutes on two
cores. They depend on the kernels, the emulator and the kernel tests only. When all of them pass,
the script writes the hash of these files to exhaustive.json. While the hash still matches, pytest
selects a sample: one test in 16, drawn by the hash. Otherwise it selects all, as it does with the
option --exhaustive.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = "tests/kernels/exhaustive.json"
HASHED = ("csrc", "tests/emulator", "tests/kernels", "jvp_attn/backends/kernel_table.py")

_ONE_IN = 16
_PARALLEL = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadgroup")


@dataclass(frozen=True)
class Record:
    """The last run in which all exhaustive tests passed: hash of the files, day, number."""

    tree: str
    date: str
    tests: int


def tree_hash(root: Path = ROOT) -> str:
    """SHA-256 of the paths and contents of the HASHED files; line endings do not matter."""
    digest = hashlib.sha256()
    for path in sorted(_hashed_files(root)):
        content = (root / path).read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _hashed_files(root: Path) -> Iterator[str]:
    for top in HASHED:
        for file in (root / top).rglob("*") if (root / top).is_dir() else [root / top]:
            path = file.relative_to(root)
            if file.is_file() and path.as_posix() != RECORD and "__pycache__" not in path.parts:
                yield path.as_posix()


def read_record(root: Path = ROOT) -> Record | None:
    """The record; None if there is none. Raises TypeError or ValueError if it is malformed."""
    if not (root / RECORD).exists():
        return None
    record = Record(**json.loads((root / RECORD).read_text()))
    datetime.date.fromisoformat(record.date)
    if len(bytes.fromhex(record.tree)) != 32 or record.tests < 1:
        raise ValueError(f"{RECORD} is malformed: {record}")
    return record


def is_current(root: Path = ROOT) -> bool:
    """Whether all exhaustive tests passed with the files as they are."""
    record = read_record(root)
    return record is not None and record.tree == tree_hash(root)


def status(root: Path = ROOT) -> str:
    """What a run of the exhaustive tests selects, and why."""
    if (record := read_record(root)) is None:
        return "all of them, which have no record of passing"
    if record.tree != tree_hash(root):
        return f"all of them, since the kernels or their tests changed after {record.date}"
    return f"1 in {_ONE_IN}, since all {record.tests} passed on {record.date} with these kernels"


def in_sample(test: str, tree: str) -> bool:
    """Whether a test, by its id, is in the sample for a tree hash."""
    return int(hashlib.sha256(f"{tree} {test}".encode()).hexdigest(), 16) % _ONE_IN == 0


class Counter:
    """A pytest plugin that counts the tests by outcome."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped


def main(root: Path = ROOT) -> int:
    """Run all exhaustive tests; write the record if each of them passes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    tree, counter = tree_hash(root), Counter()
    options = ["-m", "exhaustive", "--exhaustive", *_PARALLEL, str(root / "tests" / "kernels")]
    status = int(pytest.main(options, plugins=[counter]))
    if status == 0 and (counter.skipped or tree_hash(root) != tree):
        print("No record is written: tests were skipped, or files changed during the run.")
        return 1
    if status == 0:
        record = Record(tree, datetime.date.today().isoformat(), counter.passed)
        (root / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
