"""The process of a stage: `python -m benchmarks.first_contact.worker MODULE SETTINGS`.

It runs the cases of the stage that have not ended according to the journal. After a case that
leaves the GPU unusable it stops, and the supervisor starts another process for the rest.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.first_contact import journal
from benchmarks.first_contact.case import Case, LeftOut, Wrong
from benchmarks.first_contact.journal import Journal
from benchmarks.first_contact.settings import Settings

# Exit status: the GPU reports an error that only a new process clears.
DEVICE_LOST = 75


def main() -> None:
    module, settings = sys.argv[1], Settings.from_json(sys.argv[2])
    stage = module.rpartition(".")[2]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of this process would take minutes
    log = Journal(Path(settings.out) / "journal.jsonl")
    cases = [*_injected(stage, settings)]
    try:
        cases += _selected(import_module(module).cases(settings), settings)
    except Exception as error:
        cases.append(Case("start", partial(_raise, error)))
    ended = log.ended(stage)
    names = {x["case"] for x in ended}
    given_up = {x["group"] for x in ended if ended_the_process(x)} - {None}
    for case in cases:
        if case.name in names:
            continue
        if case.group in given_up:
            reason = f"another case of {case.group} hung, crashed or made the GPU unusable"
            log.write(stage, case.name, status=journal.LEFT_OUT, seconds=0.0, error=reason)
        elif not run(stage, case, log):
            sys.exit(DEVICE_LOST)


def ended_the_process(record: journal.Record) -> bool:
    """Whether a case took its process with it."""
    return record["status"] in (journal.CRASHED, journal.HUNG) or "device_error" in record


def run(stage: str, case: Case, log: Journal) -> bool:
    """Run a case, and write down what happened. Returns whether the GPU is still usable."""
    print(f"--- {stage}: {case.name}", flush=True)
    log.write(stage, case.name, inputs=case.inputs, group=case.group)
    start = time.perf_counter()
    facts: dict[str, Any] = {"status": journal.PASSED}
    try:
        facts["result"] = case.run()
    except LeftOut as reason:
        facts = {"status": journal.LEFT_OUT, "error": str(reason)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        facts = {"status": journal.FAILED, "error": text, "where": _where(error)}
        if isinstance(error, Wrong):
            facts["result"] = error.result
    seconds = round(time.perf_counter() - start, 3)
    lost = device_error()
    if lost:
        facts = {"error": lost, **facts, "status": journal.FAILED, "device_error": lost}
    log.write(stage, case.name, seconds=seconds, **facts, inputs=case.inputs, group=case.group)
    return lost is None


def device_error() -> str | None:
    """The error of the GPU that outlasts a case; None if it still works, or was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def _raise(error: Exception) -> None:
    raise error


def _where(error: BaseException) -> str:
    """The innermost line of this repository that raised."""
    root = str(Path(__file__).resolve().parents[2])
    frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename.startswith(root)]
    return f"{Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno}" if frames else ""


def _selected(cases: Iterable[Case], settings: Settings) -> Iterator[Case]:
    patterns = settings.cases or ("*",)
    return (x for x in cases if any(fnmatchcase(x.name, pattern) for pattern in patterns))


def _injected(stage: str, settings: Settings) -> Iterator[Case]:
    """Cases that go wrong on purpose, to rehearse that."""
    ways: dict[str, Callable[[], Any]] = {
        "hang": lambda: time.sleep(1e6),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "fail": lambda: [][0],  # IndexError
    }
    for what, where in settings.inject:
        if where == stage:
            yield Case(f"injected {what}", ways[what], {"seed": 0})


if __name__ == "__main__":
    main()
