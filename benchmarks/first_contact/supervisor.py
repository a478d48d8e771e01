"""Runs the process of a stage under time limits, again and again until all cases have ended.

A process that crashes or hangs costs one case: the journal names it, and the next process goes on
after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.first_contact import journal
from benchmarks.first_contact.journal import Journal
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.stages import Stage
from benchmarks.first_contact.worker import DEVICE_LOST

ROOT = Path(__file__).resolve().parents[2]

# Each start of a process costs seconds, so a stage in which everything fails is given up.
MAX_PROCESSES = 12
# Exit status of compute-sanitizer if it has found errors.
SANITIZER_ERRORS = 99

# For a process to import torch, and to begin its first case.
START_SECONDS = 60.0

POLL_SECONDS = 0.05
TAIL_LINES = 25


@dataclass
class Outcome:
    """How a stage went, besides its cases: `error` is None if it ran to its end."""

    seconds: float
    processes: int
    error: str | None = None


class Supervisor:
    """Runs one stage.

    Args:
        stage: which.
        settings: for its cases.
        limit: seconds for the stage.
        sanitizer: the command that runs the process, empty for none.
    """

    def __init__(
        self, stage: Stage, settings: Settings, limit: float, sanitizer: Sequence[str] = ()
    ) -> None:
        self._stage = stage
        self._journal = Journal(Path(settings.out) / "journal.jsonl")
        self._log = Path(settings.out) / "log.txt"
        if not stage.has_patterns:
            settings = replace(settings, cases=())
        worker = [sys.executable, "-m", "benchmarks.first_contact.worker"]
        self._command = [*sanitizer, *worker, stage.module, settings.as_json()]
        self._limit = limit

    def run(self) -> Outcome:
        """Run the stage to its end or to its limit."""
        start = time.monotonic()
        outcome = Outcome(0, 0)
        while outcome.processes < MAX_PROCESSES:
            outcome.processes += 1
            ended_before = len(self._journal.ended(self._stage.name))
            again, outcome.error = self._run_process(start + self._limit)
            if not again:
                break
            if len(self._journal.ended(self._stage.name)) == ended_before:
                break  # it ended no case, and the next would not either
        else:
            outcome.error = f"given up after {MAX_PROCESSES} processes"
        outcome.seconds = round(time.monotonic() - start, 1)
        return outcome

    def _run_process(self, deadline: float) -> tuple[bool, str | None]:
        """Whether cases may be left for another process, and what went wrong."""
        with self._log.open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        overrun = self._wait(process, deadline)
        if overrun is not None:
            kind, error = overrun
            error += _end(process)
            self._write_off(kind, error, self._output(begin))
            return kind == journal.HUNG, error
        status, output = process.returncode, self._output(begin)
        if status == 0:
            return False, None
        if status == DEVICE_LOST:
            return True, "the last case left the GPU unusable"
        if status == SANITIZER_ERRORS:
            return False, f"compute-sanitizer found errors:\n{_sanitizer_report(output)}"
        error = f"ended with {_signal_name(status)}"
        self._write_off(journal.CRASHED, error, output)
        return True, f"{error}\n{_tail(output)}"

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> tuple[str, str] | None:
        """Wait for the end; if a limit passes before, say which: a status of a case, and why."""
        since, last, limit = time.monotonic(), self._journal.size(), START_SECONDS
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now > deadline:
                return journal.STOPPED, f"stopped at the stage's limit of {self._limit:g} s"
            if (size := self._journal.size()) != last:  # a case has begun or ended
                since, last, limit = now, size, self._stage.case_limit
            if now - since > limit:
                return journal.HUNG, f"no end after {limit:g} s"
        return None

    def _write_off(self, status: str, error: str, output: str) -> None:
        """Close the case during which a process ended, if there is one."""
        case = self._journal.open_case(self._stage.name)
        if case is not None:
            facts = {"status": status, "error": error, "output": _tail(output), "seconds": None}
            self._journal.write(**{**case, **facts})

    def _output(self, begin: int) -> str:
        with self._log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")


def _environment() -> dict[str, str]:
    """That of a worker, which imports modules of this repository as its scripts and tests do."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    python = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # prints where a crash or SIGABRT was
    }
    return {**os.environ, **python}


def _end(process: subprocess.Popen[bytes]) -> str:
    """End a process and its children. SIGABRT first: Python then prints where it was."""
    for way, patience in ((signal.SIGABRT, 2), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            return ""
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if way == signal.SIGABRT:
            _kill_rest(process.pid)
        return ""
    return "; it cannot be killed"


def _kill_rest(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _signal_name(status: int) -> str:
    if status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-TAIL_LINES:])


def _sanitizer_report(output: str) -> str:
    """The first errors that compute-sanitizer prints."""
    lines = [x for x in output.splitlines() if x.startswith(("=========", "--- "))]
    first = next((i for i, x in enumerate(lines) if "Invalid" in x or "rror" in x), 0)
    return "\n".join(lines[max(first - 1, 0) : first + 12])
