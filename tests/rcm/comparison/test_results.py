"""Results of the comparison: kept, resumed, and shown in tables."""

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from comparison import runner, samples, tables
from comparison.run import Run
from comparison.runner import Results, Runner
from safetensors.torch import save_file

TEACHER = Run(name="teacher/digits/plain/0", preset="digits", method="scm", seed=0)
FIRST = Run(
    name="methods/digits/scm/0",
    preset="digits",
    method="scm",
    seed=0,
    options=("--student.iterations", "7"),
    teacher=TEACHER,
)
SECOND = Run(
    name="methods/digits/dmd/0",
    preset="digits",
    method="dmd",
    seed=0,
    teacher=TEACHER,
    start=FIRST,
)


def row(network: str, steps: int | None, distance: float) -> dict[str, Any]:
    return {
        "network": network,
        "steps": steps,
        "evaluations": steps,
        "mid_times": None,
        "frechet_distance": distance,
        "label_agreement": 0.9,
        "same_noise_rmse": 0.123456789,
        "diversity": 1.0,
        "diversity_ratio": 0.5,
        "precision": 0.25,
        "recall": 0.75,
    }


class FakeCommands:
    """Stands in for rcm.train and rcm.evaluate: writes what they write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self.failing: dict[str, tuple[int, str]] = {}
        monkeypatch.setattr(runner.subprocess, "run", self)

    def __call__(self, command: list[str], stdout: BinaryIO, stderr: int) -> Any:
        assert command[:2] == [sys.executable, "-m"]
        _, _, module, *options = command
        self.calls.append([module, *options])
        name = options[options.index("--folder") + 1] if module == "rcm.train" else options[0]
        folder = Path(name)
        code, output = next((f for n, f in self.failing.items() if name.endswith(n)), (0, ""))
        if code == 0 and module == "rcm.train":
            folder.mkdir(parents=True, exist_ok=True)
            settings = folder / "config.json"
            if settings.exists():
                assert settings.read_text() == json.dumps(options), "other settings are refused"
            settings.write_text(json.dumps(options))
            (folder / "report.json").write_text("{}")
        if code == 0 and module == "rcm.evaluate":
            rows = [row("real", None, 1.0), *(row("student", n, 2.0 + n) for n in (1, 2, 4))]
            content = {"iterations": 8, "protocol": {"samples": 20}, "rows": rows}
            (folder / "evaluation.json").write_text(json.dumps(content))
            images = torch.linspace(-1, 3, 20 * 4).view(20, 1, 2, 2)
            labels = torch.arange(20) // 5
            save_file({"data": images, "labels": labels}, folder / "evaluation.safetensors")
        stdout.write(output.encode())
        stdout.flush()
        return runner.subprocess.CompletedProcess(command, code)

    def trained(self) -> list[str]:
        return [c[3].split("runs/")[1] for c in self.calls if c[0] == "rcm.train"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    monkeypatch.setattr(runner, "environment", lambda: {"commit": "c0ffee"})
    return FakeCommands(monkeypatch)


def make(folder: Path, *runs: Run) -> Results:
    results = Results(folder / "methods.json")
    kept = folder / "samples.safetensors"
    Runner(folder / "runs", results, kept, jobs=1).make(runs)
    return Results(folder / "methods.json")


def test_a_run_is_made_after_those_that_it_needs_and_once(
    commands: FakeCommands, tmp_path: Path
) -> None:
    results = make(tmp_path, SECOND, FIRST)
    assert commands.trained() == [TEACHER.name, FIRST.name, SECOND.name]
    train = next(c for c in commands.calls if SECOND.name in c[3])
    assert train[train.index("--teacher") + 1] == str(tmp_path / "runs" / TEACHER.name)
    assert train[train.index("--student.start") + 1] == str(tmp_path / "runs" / FIRST.name)
    found = results.find(SECOND)
    assert found is not None
    assert found["commit"] == "c0ffee"
    assert found["iterations"] == 8
    assert found["rows"][1]["same_noise_rmse"] == 0.12346
    before = len(commands.calls)
    make(tmp_path, SECOND, FIRST)
    assert len(commands.calls) == before


def test_lost_weights_are_made_again_for_a_run_that_needs_them(
    commands: FakeCommands, tmp_path: Path
) -> None:
    make(tmp_path, FIRST)
    (tmp_path / "runs").rename(tmp_path / "lost")
    commands.calls.clear()
    make(tmp_path, FIRST, SECOND)
    assert commands.trained() == [TEACHER.name, FIRST.name, SECOND.name]
    assert [c[1] for c in commands.calls if c[0] == "rcm.evaluate"] == [
        str(tmp_path / "runs" / SECOND.name)
    ]


def test_a_result_of_other_settings_is_none(commands: FakeCommands, tmp_path: Path) -> None:
    results = make(tmp_path, FIRST)
    other = Run(**{**vars(FIRST), "options": ("--student.iterations", "9")})
    assert results.find(FIRST) is not None
    assert results.find(other) is None


def test_a_run_that_diverges_is_a_result_and_another_failure_is_an_error(
    commands: FakeCommands, tmp_path: Path
) -> None:
    commands.failing[FIRST.name] = (
        1,
        "50%\nerror: iteration 5: the consistency loss is nan; the last is /tmp/x\n",
    )
    found = make(tmp_path, FIRST).find(FIRST)
    assert found is not None
    assert found["rows"] == []
    assert found["diverged"] == "iteration 5: the consistency loss is nan"
    assert found["iterations"] == 7
    commands.failing[SECOND.name] = (1, "error: the disk is full\n")
    with pytest.raises(RuntimeError, match="the disk is full"):
        make(tmp_path, Run(**{**vars(SECOND), "start": None}))


def test_an_interrupt_stops_the_others(commands: FakeCommands, tmp_path: Path) -> None:
    commands.failing[TEACHER.name] = (130, "")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, FIRST)
    assert commands.trained() == [TEACHER.name]
    assert Results(tmp_path / "methods.json").find(FIRST) is None


def test_a_collapse_that_continued_is_noted(commands: FakeCommands, tmp_path: Path) -> None:
    commands.failing[FIRST.name] = (0, "iteration 40: the student collapsed. The RMSE")
    found = make(tmp_path, FIRST).find(FIRST)
    assert found is not None
    assert found["collapsed"] == 40


def test_a_collapse_before_an_interrupt_is_noted(commands: FakeCommands, tmp_path: Path) -> None:
    commands.failing[FIRST.name] = (130, "iteration 40: the student collapsed. The RMSE\n")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, FIRST)
    (tmp_path / "runs" / FIRST.name).mkdir()  # with its checkpoint
    commands.failing.clear()
    found = make(tmp_path, FIRST).find(FIRST)
    assert found is not None
    assert found["collapsed"] == 40


@pytest.mark.parametrize("finished", [True, False])
def test_weights_of_other_settings_are_trained_again(
    commands: FakeCommands, tmp_path: Path, finished: bool
) -> None:
    commands.failing[FIRST.name] = (0, "iteration 40: the student collapsed. The RMSE\n")
    make(tmp_path, FIRST)
    if not finished:
        (tmp_path / "runs" / FIRST.name / "report.json").unlink()
    commands.calls.clear()
    commands.failing.clear()
    other = Run(**{**vars(FIRST), "options": ("--student.iterations", "9")})
    found = make(tmp_path, other).find(other)
    assert commands.trained() == [FIRST.name]
    assert found is not None
    assert found["collapsed"] is None


def test_other_settings_of_an_evaluation_score_the_same_weights(
    commands: FakeCommands, tmp_path: Path
) -> None:
    make(tmp_path, FIRST)
    commands.calls.clear()
    make(tmp_path, Run(**{**vars(FIRST), "evaluation": ("--mid-times", "0.5")}))
    assert [c[0] for c in commands.calls] == ["rcm.evaluate"]


def test_a_run_whose_teacher_changed_is_made_again(commands: FakeCommands, tmp_path: Path) -> None:
    make(tmp_path, FIRST)
    commands.calls.clear()
    teacher = Run(**{**vars(TEACHER), "options": ("--teacher.iterations", "9")})
    make(tmp_path, Run(**{**vars(FIRST), "teacher": teacher}))
    assert commands.trained() == [TEACHER.name, FIRST.name]


def test_a_result_has_the_commit_of_its_scoring(
    commands: FakeCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter("abc")
    monkeypatch.setattr(runner, "environment", lambda: {"commit": next(commits)})
    results = make(tmp_path, TEACHER, FIRST)
    found = [results.find(run) for run in (TEACHER, FIRST)]
    assert [result and result["commit"] for result in found] == ["a", "b"]


def test_samples_of_the_grid_are_kept_in_the_range_of_the_data(
    commands: FakeCommands, tmp_path: Path
) -> None:
    make(tmp_path, FIRST)
    kept = samples.samples(tmp_path / "samples.safetensors")
    images = kept[f"{FIRST.name}/data"]
    assert images.shape == (4 * samples.PER_CLASS, 1, 2, 2)
    assert images.flatten()[0] == 0
    assert images.dtype == torch.uint8
    # The third of the last class is sample 17 of 20, whose last value is 71 / 79 of the range.
    assert images.flatten()[-1] == round(71 / 79 * 255)


def test_tables_have_means_and_ranges_over_seeds(tmp_path: Path) -> None:
    rows = [row("student", 1, distance) for distance in (2.0, 3.0)]
    assert tables.cells(rows) == ["2.50 (2.00–3.00)", "0.900", "0.50", "0.75", "0.123"]
    assert tables.cells(rows[:1])[0] == "2.00"


def test_a_page_gets_its_tables_and_keeps_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "TABLES", {"one": lambda results: "| new |"})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table one -->\n| old |\n<!-- end -->\nafter\n")
    for _ in range(2):
        tables.fill(page, Results(tmp_path / "none.json"))
        expected = "before\n<!-- table one -->\n| new |\n<!-- end -->\nafter\n"
        assert page.read_text() == expected
