"""benchmarks/methods.py as a command: its errors, its lock, and the commit of its results."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import methods
import pytest
from comparison.run import Run
from comparison.runner import Results

from tests.rcm.comparison.test_results import FIRST, TEACHER, FakeCommands

Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command with one study of one run, whose results are below tmp_path."""
    (tmp_path / "results").mkdir()
    study: dict[str, Callable[[], list[Run]]] = {"digits": lambda: [FIRST]}
    monkeypatch.setenv("JVP_ATTN_COMMIT", "c0ffee")
    monkeypatch.setattr(methods, "HERE", tmp_path)
    monkeypatch.setattr(methods, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(methods, "STUDIES", study)
    monkeypatch.setattr(methods, "draw", lambda *_: None)

    def call(*options: str) -> int:
        runs = str(tmp_path / "runs")
        monkeypatch.setattr(sys, "argv", ["methods.py", *options, "--runs", runs, "--jobs", "1"])
        return methods.main()

    return call


def test_a_failing_run_ends_the_command_with_one_line_and_keeps_the_results_of_others(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FakeCommands(monkeypatch).failing[FIRST.name] = (1, "10%\nerror: the disk is full\n")
    assert command("digits") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {FIRST.name}: error: the disk is full (see ")
    results = Results(tmp_path / "results" / "methods.json")
    assert results.find(TEACHER) is not None
    assert results.find(FIRST) is None


def test_a_second_command_on_the_same_runs_is_refused(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = FakeCommands(monkeypatch)
    with methods.locked(tmp_path / "runs"):
        assert command("digits") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: another process makes the runs in {tmp_path / 'runs'}"
    assert commands.calls == []
    assert command("digits") == 0


def test_results_and_the_page_that_holds_them_leave_the_commit_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["benchmarks/results/methods.json", "docs/methods.md", "docs/other.md"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")

    def git(*options: str) -> Any:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *options], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    monkeypatch.delenv("JVP_ATTN_COMMIT", raising=False)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "benchmarks" / "environment.py"))
    for name in files[:2]:
        (tmp_path / name).write_text("new")
    assert len(environment.commit()) == 12
    (tmp_path / files[2]).write_text("new")
    assert environment.commit().endswith("-dirty")
