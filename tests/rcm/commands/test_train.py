"""What a user sees of `python -m rcm.train`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm import run, train
from rcm.evaluation.evaluator import Evaluator
from rcm.presets import PRESETS
from rcm.training.loop import phase_text
from rcm.training.trainer import Trainer
from tests.rcm.commands.tiny_run import TINY, error_of, metrics, start, stop_at

pytestmark = pytest.mark.xdist_group("train")


def test_a_run_writes_all_its_files(finished: Path) -> None:
    expected = [
        "config.json",
        "metrics.jsonl",
        "teacher.safetensors",
        "student.safetensors",
        "grid.png",
    ]
    expected += ["report.md", "report.json", "grids/0000005.png", "grids/0000010.png"]
    for name in expected:
        assert (finished / name).stat().st_size > 0, name
    lines = metrics(finished)
    steps = [(line["phase"], line["iteration"]) for line in lines if "loss" in line]
    assert steps == [("teacher", i + 1) for i in range(12)] + [
        ("student", i + 1) for i in range(10)
    ]
    scores = json.loads((finished / "report.json").read_text())["scores"]
    for name in ("teacher, 1 step", "teacher, 32 steps", "student, 1 step", "student, 4 steps"):
        assert scores[name]["frechet_distance"] > 0
    assert scores["teacher, 32 steps"]["same_noise_rmse"] == 0


def test_another_seed_gives_other_metrics(finished: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--seed", "1") == 0
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(finished)[0]["loss"]


@pytest.mark.parametrize(
    ("phase", "term"), [("teacher", "flow matching loss"), ("student", "consistency loss")]
)
def test_a_nan_loss_stops_the_run_and_names_iteration_loss_and_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    phase: str,
    term: str,
) -> None:
    step = Trainer.step

    def with_nan_weights(self: Trainer) -> dict[str, float]:
        if self.name == phase and self.iteration == 6:
            with torch.no_grad():
                self.network.tokens_in.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
        return step(self)

    monkeypatch.setattr(Trainer, "step", with_nan_weights)
    assert start(tmp_path / "run") == 1
    message = error_of(capsys)
    assert "iteration 7" in message
    assert term in message
    assert message.endswith(f"{phase}-0000004")


def with_nan_students(patch: pytest.MonkeyPatch, iterations: set[int]) -> list[bool]:
    """The student is NaN in iterations 1, 2, ...; returns whether each moved its average."""
    step, moved = Trainer.step, []

    def watched(self: Trainer) -> dict[str, float]:
        if self.name != "student":
            return step(self)
        student, average = self.network, self.averages["student"]
        before = {name: weight.clone() for name, weight in average.average.items()}
        forward = student.forward
        with pytest.MonkeyPatch.context() as inner:
            if self.iteration + 1 in iterations:
                inner.setattr(student, "forward", lambda *a, **k: torch.nan * forward(*a, **k))
            metrics = step(self)
        moved.append(any(not torch.equal(average.average[n], w) for n, w in before.items()))
        return metrics

    patch.setattr(Trainer, "step", watched)
    return moved


SKIPPING = (
    *("--student.optimizer.nonfinite", "skip", "--student.optimizer.max-skips", "2"),
    *("--student.critic-optimizer.nonfinite", "skip"),
)


def test_iterations_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = with_nan_students(monkeypatch, {3, 4, 7})
    assert start(tmp_path / "run", *SKIPPING) == 0
    lines = [line for line in metrics(tmp_path / "run") if line["phase"] == "student"]
    skipped = {line["iteration"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped == {3: 1, 4: 2, 7: 1}
    assert {line["iteration"] for line in lines if "critic_skipped" in line} == {3, 4, 7}
    assert [i for i, average_moved in enumerate(moved, 1) if not average_moved] == [3, 4, 7]


def test_a_run_stops_after_more_skipped_iterations_in_a_row_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with_nan_students(monkeypatch, {4, 5, 6, 7})
    assert start(tmp_path / "run", *SKIPPING) == 1
    assert error_of(capsys) == (
        "error: iteration 6: the consistency loss is NaN everywhere, and so were 2 updates before; "
        f"the last intact checkpoint is {tmp_path}/run/checkpoints/student-0000004"
    )


def test_non_finite_weights_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step = Trainer.step

    def with_nan_average(self: Trainer) -> dict[str, float]:
        metrics = step(self)
        if self.iteration == 8:
            next(iter(self.averages["teacher"].average.values())).fill_(torch.nan)
        return metrics

    monkeypatch.setattr(Trainer, "step", with_nan_average)
    assert start(tmp_path / "run") == 1
    message = error_of(capsys)
    assert "iteration 8: the averaged weights are not finite" in message
    assert message.endswith("teacher-0000004")


def test_samples_that_are_not_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def diverged(self: Evaluator, student: object, steps: int) -> torch.Tensor:
        return torch.full_like(self.noise, torch.nan)

    monkeypatch.setattr(Evaluator, "student_samples", diverged)
    assert start(tmp_path / "run") == 1
    assert "samples of student, 1 step cannot be scored" in error_of(capsys)


@pytest.mark.parametrize(
    ("iteration", "where"), [(2, "there is no checkpoint yet"), (6, "teacher-0000004")]
)
def test_an_interrupted_run_says_where_its_checkpoint_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    iteration: int,
    where: str,
) -> None:
    stop_at(monkeypatch, "teacher", iteration, KeyboardInterrupt)
    assert start(tmp_path / "run") == 130
    message = error_of(capsys)
    assert where in message
    assert message.endswith("repeat the command to continue")


RARELY = ("--report-every", "100", "--probe-every", "100")


def test_a_run_says_what_is_next_and_can_be_interrupted_while_it_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def next_lines() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("next: ")]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_at(patch, "student", 6, KeyboardInterrupt)
        assert start(tmp_path / "run", *RARELY) == 130
    assert next_lines() == [
        "next: classifier of digits; then teacher, 12 iterations of 16; "
        "then student (rcm), 10 iterations of 16; then scores",
        "next: student (rcm), 10 iterations of 16; then scores",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "teacher_row", interrupted)
        assert start(tmp_path / "run", *RARELY) == 130
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line.startswith("next: ")] == [
        "next: classifier of digits; then student (rcm), 10 iterations of 16 from iteration 4; "
        "then scores",
        "next: scores",
    ]
    assert printed.err.count("\n") == 2
    assert "student-0000010; repeat the command to continue" in printed.err
    assert start(tmp_path / "run", *RARELY) == 0
    assert next_lines() == ["next: classifier of digits; then scores", "next: scores"]


def test_one_iteration_is_singular() -> None:
    teacher = replace(PRESETS["digits"].config("rcm").phases()[0], iterations=1, batch=16)
    assert phase_text("teacher", teacher) == "teacher, 1 iteration of 16"


def test_a_student_without_times_for_four_steps_is_sampled_in_fewer(tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--student.mid-times", "1.0") == 0
    scores = json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    students = [name for name in scores if name.startswith("student")]
    assert students == ["student, 1 step", "student, 2 steps"]


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--folder",
        "--dry-run",
        "--seed",
        "--student.tangent-warmup",
        "--teacher.ema.std",
        "--method",
        "--on-collapse",
    ):
        assert option in text


def test_one_rank_prints_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        train.main(["wan-tiny", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_builds_everything_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", *TINY]) == 0
    assert "dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_uses_the_threads_of_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(run, "run_from_scratch", lambda *arguments: None)
    assert start(tmp_path / "default") == 0
    assert start(tmp_path / "three", "--threads", "3") == 0
    assert used == [1, 3]


def test_a_device_that_is_absent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start(tmp_path / "run", "--device", "cuda") == 2
    assert "no CUDA device" in error_of(capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert start(tmp_path / "run", "--device", "cuda:2") == 2
    assert "cuda:N with N in 0..1" in error_of(capsys)
    assert not (tmp_path / "run").exists()
