"""benchmarks/first_contact survives whatever happens in a stage, and writes it down."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.first_contact import report, supervisor
from benchmarks.first_contact.__main__ import main
from benchmarks.first_contact.journal import Journal, Record
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.stages import STAGES, Stage, chosen
from benchmarks.first_contact.supervisor import Outcome, Supervisor

ROOT = Path(__file__).resolve().parents[2]
ODD = Stage("odd_cases", "?", limit=120, case_limit=60, package="tests.gpu")

Run = Callable[..., tuple[Outcome, dict[str, Record]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run cases of odd_cases.py; returns how the stage went, and the last record of each case."""

    def run_cases(
        *names: str, limit: float = 120, case_limit: float = 60, sanitizer: tuple[str, ...] = ()
    ) -> tuple[Outcome, dict[str, Record]]:
        settings = Settings(str(tmp_path), cases=names)
        stage = Stage("odd_cases", "?", limit, case_limit, package="tests.gpu")
        outcome = Supervisor(stage, settings, limit, sanitizer).run()
        return outcome, {x["case"]: x for x in Journal(tmp_path / "journal.jsonl").ended()}

    return run_cases


def statuses(records: dict[str, Record]) -> dict[str, str]:
    return {name: record["status"] for name, record in records.items()}


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().splitlines()


# ----------------------------------------------------------------------------
# What happens in a case


def test_a_result_is_recorded(run: Run) -> None:
    outcome, records = run("passes")
    assert (outcome.error, outcome.processes) == (None, 1)
    assert records["passes"]["status"] == "passed"
    assert records["passes"]["result"] == {"answer": 42}


def test_a_failure_is_recorded_with_its_inputs_and_place(run: Run) -> None:
    outcome, records = run("passes*", "fails*", "is left out")
    assert (outcome.error, outcome.processes) == (None, 1)
    failure = records["fails"]
    assert failure["error"] == "AssertionError: 3 of 64 numbers differ"
    assert failure["inputs"] == {"seed": 7}
    assert failure["where"].startswith("tests/gpu/odd_cases.py:")
    assert records["fails with a result"]["result"] == {"tflops": 1}
    assert statuses(records) == {
        "passes": "passed",
        "fails": "failed",
        "fails with a result": "failed",
        "is left out": "left out",
        "passes at last": "passed",
    }


def test_a_crash_costs_one_case(run: Run) -> None:
    outcome, records = run("passes*", "crashes", "exits")
    assert (outcome.error, outcome.processes) == (None, 3)
    assert statuses(records) == {
        "passes": "passed",
        "crashes": "crashed",
        "exits": "crashed",
        "passes at last": "passed",
    }
    assert records["crashes"]["error"] == "ended with signal SIGSEGV"
    assert "Segmentation fault" in records["crashes"]["output"]
    assert records["crashes"]["inputs"] == {"seed": 7}
    assert records["exits"]["error"] == "ended with exit status 3"


def test_a_hang_costs_one_case_and_its_place_is_known(run: Run) -> None:
    outcome, records = run("passes*", "hangs", case_limit=3)
    assert (outcome.error, outcome.processes) == (None, 2)
    assert statuses(records) == {"passes": "passed", "hangs": "hung", "passes at last": "passed"}
    assert records["hangs"]["error"] == "no end after 3 s"
    assert "odd_cases.py" in records["hangs"]["output"]
    assert records["hangs"]["inputs"] == {"seed": 7}


def test_a_lost_device_costs_a_process(run: Run) -> None:
    outcome, records = run("loses the device", "passes at last")
    assert (outcome.error, outcome.processes) == (None, 2)
    error = "CUDA error: an illegal memory access was encountered"
    assert records["loses the device"]["error"] == error
    assert records["passes at last"]["status"] == "passed"


@pytest.mark.parametrize("how", ["crashes at exit", "hangs at exit"])
def test_a_process_that_does_not_end_well_costs_nothing(run: Run, how: str) -> None:
    outcome, records = run(how, case_limit=3)
    assert (outcome.error, outcome.processes) == (None, 2)
    assert statuses(records) == {how: "passed"}


def test_the_group_of_a_crash_is_left_out(run: Run) -> None:
    _, records = run("crashes", "is of the group of a crash")
    assert statuses(records) == {"crashes": "crashed", "is of the group of a crash": "left out"}


# ----------------------------------------------------------------------------
# What happens to a stage


def test_a_stage_stops_at_its_limit_and_keeps_what_it_has(run: Run) -> None:
    outcome, records = run("passes*", "hangs", limit=8)
    assert outcome.error == "stopped at the stage's limit of 8 s"
    assert statuses(records) == {"passes": "passed", "hangs": "stopped"}


def test_a_process_that_does_not_begin_is_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.5)
    sleeping = (sys.executable, "-c", "import time; time.sleep(1e6)")
    outcome, records = run("passes", sanitizer=sleeping)
    assert (outcome.error, outcome.processes) == ("no end after 0.5 s", 1)
    assert records == {}


def test_a_process_that_cannot_begin_is_not_started_again(run: Run) -> None:
    broken = (sys.executable, "-c", "print('no such GPU'); raise SystemExit(2)")
    outcome, _ = run("passes", sanitizer=broken)
    assert (outcome.error, outcome.processes) == ("ended with exit status 2\nno such GPU", 1)


def test_a_stage_without_cases_tells_why(run: Run) -> None:
    outcome, records = run("no cases")
    assert (outcome.error, outcome.processes) == (None, 1)
    assert records["start"]["status"] == "failed"
    assert records["start"]["error"] == "RuntimeError: torch finds no NVIDIA GPU"
    assert records["start"]["where"].startswith("tests/gpu/odd_cases.py:")


def test_a_stage_is_given_up_after_many_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_PROCESSES", 2)
    outcome, records = run("loses the device", "exits", "passes at last")
    assert outcome.error == "given up after 2 processes"
    assert set(records) == {"loses the device", "exits"}


def test_errors_that_a_sanitizer_finds_fail_the_stage(run: Run) -> None:
    finds = (
        "import subprocess, sys; subprocess.run(sys.argv[1:]); "
        "print('========= Invalid __global__ write of size 4'); sys.exit(99)"
    )
    outcome, records = run("passes", sanitizer=(sys.executable, "-c", finds))
    assert outcome.processes == 1
    assert outcome.error is not None
    assert outcome.error.startswith("compute-sanitizer found errors:")
    assert "Invalid __global__ write of size 4" in outcome.error
    assert statuses(records) == {"passes": "passed"}


# ----------------------------------------------------------------------------
# The journal


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    log = Journal(tmp_path / "journal.jsonl")
    log.write("smoke", "one", status="passed")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('\n{"stage": "smoke", "case": "tw')
    log.write("smoke", "three", status="passed")
    assert [x["case"] for x in log.ended("smoke")] == ["one", "three"]


# ----------------------------------------------------------------------------
# The whole run


def run_main(folder: Path, *arguments: str, stages: list[Stage] | None = None) -> int:
    command = ["--rehearse", "--out", str(folder), *arguments]
    with pytest.raises(SystemExit) as end:
        main(command, stages or [ODD])
    return int(end.value.code or 0)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_exit_status_tells_whether_all_passed(tmp_path: Path) -> None:
    assert run_main(tmp_path, "--cases", "passes*") == 0
    assert run_main(tmp_path, "--cases", "passes*", "fails") == 1
    [stage] = results(tmp_path)["stages"]
    assert stage["status"] == "failed"
    assert stage["cases"] == {"passed": 2, "failed": 1}
    assert {x["case"] for x in results(tmp_path)["cases"]} == {"passes", "passes at last", "fails"}


def test_a_stage_after_a_failed_one_runs_unless_it_needs_it(tmp_path: Path) -> None:
    needing = Stage("odd_cases", "?", 60, 60, ("other/extension",), package="tests.gpu")
    assert run_main(tmp_path, "--cases", "passes", stages=[needing]) == 1
    [stage] = results(tmp_path)["stages"]
    assert stage["status"] == "not run"
    assert stage["error"] == "it needs other/extension, which has not run"

    other = Stage("other", "does not exist", 60, 60)
    told = ["--cases", "passes", "--passed", "other"]
    assert run_main(tmp_path, *told, stages=[other, needing]) == 0
    assert run_main(tmp_path, "--cases", "passes", stages=[other, ODD]) == 1
    assert [x["status"] for x in results(tmp_path)["stages"]] == ["failed", "passed"]


def test_what_passed_is_not_repeated_after_a_resume(tmp_path: Path) -> None:
    assert run_main(tmp_path, "--cases", "passes", "fails") == 1
    assert run_main(tmp_path, "--cases", "passes*", "fails", "--resume") == 1
    assert Counter(ran(tmp_path)) == {"passes": 1, "fails": 2, "passes at last": 1}
    assert run_main(tmp_path, "--cases", "passes") == 0
    assert Counter(ran(tmp_path))["passes"] == 2


def test_without_time_nothing_runs(tmp_path: Path) -> None:
    assert run_main(tmp_path, "--seconds", "5") == 1
    assert results(tmp_path)["stages"][0]["error"] == "no time is left"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("how", "status"), [("crash", "crashed"), ("fail", "failed")])
def test_a_rehearsal_can_inject_faults(tmp_path: Path, how: str, status: str) -> None:
    assert run_main(tmp_path, "--cases", "passes", "--inject", f"{how}:odd_cases") == 1
    found = {x["case"]: x["status"] for x in results(tmp_path)["cases"]}
    assert found == {f"injected {how}": status, "passes": "passed"}


def test_the_commit_may_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_COMMIT", "")
    run_main(tmp_path, "--cases", "passes", "--commit", "0123456789ab")
    assert os.environ["JVP_ATTN_COMMIT"] == "0123456789ab"


def test_a_killed_run_has_written_what_it_knows(tmp_path: Path) -> None:
    killed = Stage("odd_cases", "?", 60, 60, package="tests.gpu")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "stage_line", kill)
        with pytest.raises(KeyboardInterrupt):
            main(["--rehearse", "--out", str(tmp_path), "--cases", "passes", "fails"], [killed])
    assert [x["status"] for x in Journal(tmp_path / "journal.jsonl").ended()] == [
        "passed",
        "failed",
    ]
    assert "3 of 64 numbers differ" in (tmp_path / "log.txt").read_text()


# ----------------------------------------------------------------------------
# The plan


def names(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_stages_are_chosen() -> None:
    every = names(chosen(STAGES))
    assert every[:4] == ["machine", "build", "smoke", "conformance"]
    assert "compare" not in every
    assert names(chosen(STAGES, names=["compare"])) == ["machine", "compare"]
    assert names(chosen(STAGES, first="speed")) == ["machine", "speed", "memcheck"]
    assert names(chosen(STAGES, first="speed", passed=["speed"])) == ["machine", "memcheck"]


def test_needs_are_cases_of_earlier_stages() -> None:
    for i, stage in enumerate(STAGES):
        earlier = names(STAGES[:i])
        assert all(need.partition("/")[0] in earlier for need in stage.needs)


def test_every_stage_has_its_module_and_is_documented() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for stage in STAGES:
        assert (ROOT / stage.module.replace(".", "/")).with_suffix(".py").exists()
        assert f"| `{stage.name}`" in text


def test_the_summary_stays_short() -> None:
    records = [
        {"stage": "kernels", "case": f"forward #{i}", "status": "failed", "error": "x" * 9999}
        for i in range(999)
    ]
    outcome = {
        "stage": "kernels",
        "seconds": 1.0,
        "status": "failed",
        "error": None,
        "cases": {"failed": 999},
    }
    assert len(report.summary({"device": "H200"}, [outcome], records, 1)) < 8000


def test_the_summary_has_the_speeds() -> None:
    def timed(stage: str, case: str, tflops: dict[str, float]) -> Record:
        row = {"tflops": {**tflops, "matmul": 800.0}, "seconds": {"jvp_attn": [0.003, 0.002, 1]}}
        return {"stage": stage, "case": case, "status": "passed", "result": row}

    records = [
        timed("speed", "forward, d64, 4096", {"jvp_attn": 400, "torch SDPA (cuDNN)": 500}),
        timed("speed", "backward, d64, 4096", {"torch SDPA (cuDNN)": 300}),
        timed("compare", "NAME=0, forward, d64", {"jvp_attn": 400, "x": 300, "again": 404}),
    ]
    lines = [" ".join(line.split()) for line in report.summary({}, [], records, 1).splitlines()]
    assert lines[-3:] == [
        "forward, d64, 4096 jvp_attn 400 cuDNN 500 (3 ms, matmul 800, 50% of it)",
        "backward, d64, 4096 cuDNN 300 (matmul 800)",
        "NAME=0, forward, d64 as built 400, again 1.010 times, with it 0.750 times "
        "(3 ms, matmul 800, 50% of it)",
    ]


@pytest.mark.parametrize("rehearse", [False, True])
def test_only_speeds_of_a_gpu_are_kept_for_the_benchmarks(tmp_path: Path, rehearse: bool) -> None:
    log = Journal(tmp_path / "journal.jsonl")
    row = {"tflops": {"jvp_attn": 400, "matmul": 800.0}, "seconds": {"jvp_attn": [0.003]}}
    log.write("speed", "forward, d64, 4096", status="passed", seconds=1.0, result=row)
    report.write(tmp_path, Settings(str(tmp_path), rehearse), [], log, 1.0)
    assert (tmp_path / "attention-cuda.json").exists() is not rehearse
    summary = (tmp_path / "summary.txt").read_text()
    assert ("speeds say nothing" in summary) is rehearse


def test_a_signal_has_its_name() -> None:
    assert supervisor._signal_name(-signal.SIGABRT) == "signal SIGABRT"
