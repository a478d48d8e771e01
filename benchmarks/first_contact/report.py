"""results.json and summary.txt: what happened, for programs and for readers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.first_contact.journal import BAD, LEFT_OUT, Journal, Record
from benchmarks.first_contact.settings import Settings

# The end of the output may be all that a reader sees: failures are cut to these sizes.
FAILURES = 12
FAILURE_LENGTH = 350

ABBREVIATIONS = {
    "jvp_attn (nondeterministic)": "sums",
    "torch SDPA (MATH)": "MATH",
    "torch SDPA (flash)": "flash",
    "torch SDPA (efficient)": "efficient",
    "torch SDPA (cuDNN)": "cuDNN",
}


def write(
    folder: Path,
    settings: Settings,
    outcomes: Sequence[dict[str, Any]],
    log: Journal,
    seconds: float,
) -> None:
    """Write results.json and summary.txt anew, and attention-cuda.json once a GPU was timed."""
    records = log.ended()
    machine = next((x.get("result") for x in records if x["case"] == "facts"), None) or {}
    results = {
        "machine": machine,
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        "stages": outcomes,
        "cases": records,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = summary(machine, outcomes, records, seconds)
    if settings.rehearse:
        text = (
            "A rehearsal on the CPU: sizes are smaller than named, and speeds say nothing.\n" + text
        )
    (folder / "summary.txt").write_text(text)
    rows = [x["result"] for x in records if x["stage"] == "speed" and x.get("result")]
    if rows and not settings.rehearse:
        measured = {**machine, "dtype": "bfloat16", "rows": rows}
        (folder / "attention-cuda.json").write_text(json.dumps(measured, indent=1) + "\n")


def summary(
    machine: Record, outcomes: Sequence[dict[str, Any]], records: Sequence[Record], seconds: float
) -> str:
    """The tables that are printed last."""
    known = ("device", "torch", "cuda", "python", "commit", "date")
    lines = [", ".join(f"{x} {machine[x]}" for x in known if machine.get(x))]
    lines += [stage_line(x) for x in outcomes]
    lines += [f"{'in all':16}{seconds:6.1f} s", *_failures(outcomes, records)]
    lines += _speeds([x for x in records if x["stage"] in ("speed", "compare")])
    return "\n".join(lines) + "\n"


def stage_line(outcome: dict[str, Any]) -> str:
    """The name, time and cases of a stage."""
    cases = ", ".join(f"{count} {status}" for status, count in outcome["cases"].items())
    error = (outcome.get("error") or "").splitlines()
    return f"{outcome['stage']:16}{outcome['seconds']:6.1f} s  {outcome['status']:8}{cases}" + (
        f"; {error[0]}" if error else ""
    )


def _failures(outcomes: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[str]:
    """What failed, in short; results.json has the whole."""
    bad = [x for x in records if x["status"] in BAD]
    texts = [f"{x['stage']}/{x['case']} {x['status']}: {x['error']}" for x in bad]
    texts += [f"{x['stage']}: {x['error']}" for x in outcomes if "\n" in (x.get("error") or "")]
    lines = [_shortened(text) for text in texts[:FAILURES]]
    if len(texts) > FAILURES:
        lines.append(f"… and {len(texts) - FAILURES} more in results.json")
    left_out = sum(x["status"] == LEFT_OUT for x in records)
    if left_out:
        lines.append(f"{left_out} cases cannot run on this machine")
    return ["", *lines] if lines else []


def _shortened(text: str) -> str:
    """Its beginning and its end."""
    if len(text) <= FAILURE_LENGTH:
        return text
    return f"{text[: FAILURE_LENGTH // 2]} … {text[-FAILURE_LENGTH // 2 :]}"


def _speeds(records: Sequence[Record]) -> list[str]:
    """A line for each problem: TFLOP/s of each contender."""
    rows = [(x["stage"], x["case"], x["result"]) for x in records if _is_timed(x)]
    lines = [_speed_line(stage, case, row) for stage, case, row in rows]
    return ["", "TFLOP/s", *lines] if lines else []


def _is_timed(record: Record) -> bool:
    return "tflops" in (record.get("result") or {})


def _speed_line(stage: str, case: str, row: dict[str, Any]) -> str:
    rates = dict(row["tflops"])
    matmul = rates.pop("matmul")
    ours = rates.get("jvp_attn")
    facts = [f"matmul {matmul:.3g}"]
    if ours:
        facts.insert(0, f"{1e3 * statistics.median(row['seconds']['jvp_attn']):.3g} ms")
        facts[-1] += f", {ours / matmul:.0%} of it"
    if stage == "compare" and len(rates) == 3:
        as_built, other, again = rates.values()
        text = (
            f"as built {as_built:.3g}, again {again / as_built:.3f} times, "
            f"with it {other / as_built:.3f} times"
        )
    else:
        text = "  ".join(f"{ABBREVIATIONS.get(name, name)} {x:.3g}" for name, x in rates.items())
    return f"{case:30} {text}  ({', '.join(facts)})"
