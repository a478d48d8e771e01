"""`benchmarks/first_contact.sh`: builds, tests and times the CUDA kernels within a limit of time.

Every stage is a process of its own. If it fails, crashes or hangs, that is written down and the
next one runs. The folder of results has

    results.json    everything, after each stage: device, versions, commit, cases, times
    journal.jsonl   each case as it begins and ends; a failed one with its inputs and their seed
    log.txt         the output of all processes
    summary.txt     the tables that are printed last

The exit status is 1 if a stage failed or did not run. This module imports no torch, so that nothing
that breaks in a stage can break it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_contact import report
from benchmarks.first_contact.journal import BAD, Journal, counts
from benchmarks.first_contact.sanitizer import sanitizer_command
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.stages import STAGES, Stage, chosen
from benchmarks.first_contact.supervisor import Supervisor

TOTAL_SECONDS = 480
# With less time left a stage does not start.
SHORTEST_STAGE = 10


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> None:
    """Run the stages that the command line chooses."""
    options = _options(arguments, stages)
    settings = _settings(options)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Journal(out / "journal.jsonl")
    log.restart(keep_passed=options.resume)
    if not options.resume:
        (out / "log.txt").write_bytes(b"")
    if options.commit:
        os.environ["JVP_ATTN_COMMIT"] = options.commit

    start = time.monotonic()
    outcomes: list[dict[str, Any]] = []
    for stage in chosen(stages, options.stages, options.begin, options.passed):
        left = options.seconds - (time.monotonic() - start)
        outcomes.append(outcome := _run(stage, settings, log, left, options))
        print(report.stage_line(outcome), flush=True)
        report.write(out, settings, outcomes, log, time.monotonic() - start)
    print("\n" + (out / "summary.txt").read_text(), end="")
    sys.exit(any(x["status"] != "passed" for x in outcomes))


def _run(
    stage: Stage, settings: Settings, log: Journal, left: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a stage, and say how it went."""
    facts: dict[str, Any] = {"stage": stage.name, "question": stage.question, "seconds": 0.0}
    if reason := _why_not(stage, log, left, options.passed):
        return {**facts, "status": "not run", "error": reason, "cases": {}}
    sanitizer: list[str] = []
    if stage.under_sanitizer and not settings.rehearse:
        sanitizer = sanitizer_command()
        if not sanitizer:
            return {**facts, "status": "not run", "error": "no compute-sanitizer", "cases": {}}
    print(f"{stage.name}: {stage.question}", flush=True)
    patient = stage.with_patience(options.patience)
    outcome = Supervisor(patient, settings, min(patient.limit, left), sanitizer).run()
    cases = counts(log.ended(stage.name))
    bad = outcome.error is not None or any(cases.get(status) for status in BAD)
    return {
        **facts,
        "status": "failed" if bad else "passed",
        "seconds": outcome.seconds,
        "processes": outcome.processes,
        "error": outcome.error,
        "cases": cases,
    }


def _why_not(stage: Stage, log: Journal, left: float, passed: list[str]) -> str | None:
    """Why a stage cannot run; None if it can."""
    if left < SHORTEST_STAGE:
        return "no time is left"
    status = {f"{x['stage']}/{x['case']}": x["status"] for x in log.ended()}
    for need in stage.needs:
        if need.partition("/")[0] not in passed and status.get(need) != "passed":
            return f"it needs {need}, which {status.get(need, 'has not run')}"
    return None


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        out=str(options.out.resolve()),
        rehearse=options.rehearse,
        cases=tuple(options.cases),
        contenders=tuple(options.contenders),
        comparisons=tuple(options.comparisons),
        definitions=tuple(options.define),
        inject=tuple(tuple(x.split(":")) for x in options.inject),
    )


def _options(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    names = [stage.name for stage in stages]
    parser = argparse.ArgumentParser(
        prog="benchmarks/first_contact.sh",
        description=__doc__.partition("\n\n")[2],
        epilog="stages:\n" + "".join(f"  {x.name:15} {x.question}\n" for x in stages),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT") or "build/first_contact"),
        help="folder for results; default $OUT, else build/first_contact")  # fmt: skip
    add("--seconds", type=float, default=TOTAL_SECONDS, help="for everything; default %(default)s")
    add("--patience", type=float, default=1, help="factor of all limits but --seconds")
    add("--stages", nargs="+", choices=names, metavar="STAGE", help="only these; compare if named")
    add("--from", dest="begin", choices=names, metavar="STAGE", help="this stage and later ones")
    add("--passed", nargs="+", choices=names, default=[], metavar="STAGE",
        help="these have passed: leave them out, and run what needs them")  # fmt: skip
    add("--resume", action="store_true", help="keep the cases in --out that have passed")
    add("--cases", nargs="+", default=[], metavar="PATTERN", help='such as "forward_jvp_*_sm90*"')
    add("--contenders", nargs="+", default=[], metavar="NAME", help="of benchmarks/contenders.py")
    add("--comparisons", nargs="+", default=[], metavar="NAME", help="of the stage compare")
    add("--define", nargs="+", default=[], metavar="NAME=VALUE", help="macros for all kernels")
    add("--commit", help="for results.json, where there is no .git")
    add("--rehearse", action="store_true", help="on stand-ins on the CPU, without a GPU")
    add("--inject", nargs="+", default=[], metavar="HOW:STAGE",
        help="in a rehearsal, a case that hangs, crashes or fails: crash:smoke")  # fmt: skip
    options = parser.parse_args(arguments)
    for text in options.inject:
        how, _, stage = text.partition(":")
        if how not in ("hang", "crash", "fail") or stage not in names:
            parser.error(f"--inject {text!r} is none of hang, crash, fail with a stage")
    if options.inject and not options.rehearse:
        parser.error("--inject needs --rehearse")
    return options


if __name__ == "__main__":
    main()
