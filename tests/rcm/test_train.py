"""What a user sees of `python -m rcm.train` and `python -m rcm.sample`."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm import evaluation, sample, train
from rcm.config import PRESETS
from rcm.digits import load_digits, train_features
from rcm.training import StudentPhase, TeacherPhase

pytestmark = pytest.mark.xdist_group("train")

# A network and phases so small that a whole run takes seconds.
TINY = [
    *("--model.dim", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--teacher.iterations", "12", "--student.iterations", "10"),
    *(
        "--student.tangent-warmup",
        "4",
        "--student.critic-start",
        "2",
        "--student.batch",
        "16",
        "--teacher.batch",
        "16",
    ),
    *("--report-every", "5", "--checkpoint-every", "4"),
]


@pytest.fixture(scope="module", autouse=True)
def _little_data() -> Iterator[None]:
    """200 of the digits, and features trained once, for every run inside this process."""
    digits = load_digits()
    few = replace(digits, images=digits.images[:200], labels=digits.labels[:200])
    features = train_features(few, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_digits", lambda: few)
        patch.setattr(evaluation, "train_features", lambda digits: features)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert start(folder) == 0
    return folder


def start(folder: Path, *options: str) -> int:
    return train.main(["--run", str(folder), *TINY, *options])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
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
    steps = [(line["phase"], line["iteration"]) for line in lines if "samples" not in line]
    assert steps == [("teacher", i + 1) for i in range(12)] + [
        ("student", i + 1) for i in range(10)
    ]
    scores = json.loads((finished / "report.json").read_text())["scores"]
    for name in ("teacher, 1 step", "teacher, 32 steps", "student, 1 step", "student, 4 steps"):
        assert scores[name]["frechet_distance"] > 0
    assert scores["teacher, 32 steps"]["same_noise_rmse"] == 0


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test catches it."""


@pytest.mark.parametrize(
    ("phase", "iteration"),
    [(TeacherPhase, 3), (TeacherPhase, 9), (StudentPhase, 1), (StudentPhase, 7)],
)
def test_a_run_killed_at_any_iteration_continues_to_the_same_metrics(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: type,
    iteration: int,
) -> None:
    step: Callable = phase.step

    def killed(self: TeacherPhase | StudentPhase) -> dict[str, float]:
        if self.iteration + 1 == iteration:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(phase, "step", killed)
        with pytest.raises(Killed):
            start(tmp_path / "run")
    assert start(tmp_path / "run") == 0
    for name in ("metrics.jsonl", "student.safetensors", "report.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_checkpoint_costs_only_the_way_back(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StudentPhase, "step", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            start(folder)
    newest = sorted((folder / "checkpoints").glob("teacher-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    (folder / "teacher.safetensors").unlink()
    assert start(folder) == 0
    assert "damaged" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_finished_run_repeats_its_table_and_changes_no_metrics(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert start(finished) == 0
    assert "| student, 1 step |" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_teacher_in_the_folder_is_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "teacher.safetensors"):
        (folder / name).write_bytes((finished / name).read_bytes())
    assert start(folder) == 0
    assert {line["phase"] for line in metrics(folder)} == {"student"}


def error_of(capsys: pytest.CaptureFixture) -> str:
    text: str = capsys.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.replace("│", " ").split())


def test_another_seed_gives_other_metrics(finished: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--seed", "1") == 0
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(finished)[0]["loss"]


def test_other_settings_in_the_same_folder_are_refused(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(finished, "--student.optimizer.lr", "0.5") == 1
    assert "student.optimizer.lr = 0.0001 there, 0.5 now" in error_of(capsys)


def test_a_folder_of_another_preset_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(PRESETS, "other", lambda: replace(PRESETS["digits"](), preset="other"))
    assert train.main(["other", "--run", str(finished), *TINY]) == 1
    assert "preset = digits there, other now" in error_of(capsys)


def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert start(tmp_path) == 1
    assert "thesis.tex" in error_of(capsys)
    assert [p.name for p in tmp_path.iterdir() if p.name != "lock"] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file" / "run") == 1
    assert "cannot be written" in error_of(capsys)


def test_a_folder_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture) -> None:
    with open(finished / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert start(finished) == 1
    assert "another process" in error_of(capsys)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name.startswith("student-0000008"):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert start(tmp_path / "run") == 1
    message = error_of(capsys)
    assert "No space left" in message
    assert "student-0000004.pt" in message
    assert start(tmp_path / "run") == 0
    same = (tmp_path / "run" / "metrics.jsonl", finished / "metrics.jsonl")
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize(
    ("phase", "term"), [("teacher", "flow matching loss"), ("student", "consistency loss")]
)
def test_a_loss_that_turns_nan_stops_with_step_term_and_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    phase: str,
    term: str,
) -> None:
    cls = {"teacher": TeacherPhase, "student": StudentPhase}[phase]
    step = cls.step

    def poisoned(self: TeacherPhase | StudentPhase) -> dict[str, float]:
        if self.iteration == 6:
            network = self.network if isinstance(self, TeacherPhase) else self.student
            with torch.no_grad():
                network.tokens_in.weight.fill_(torch.nan)
        return step(self)

    monkeypatch.setattr(cls, "step", poisoned)
    assert start(tmp_path / "run") == 1
    message = error_of(capsys)
    assert "iteration 7" in message
    assert term in message
    assert f"{phase}-0000004.pt" in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["digts"], "perhaps you meant 'digits'"),
        (["--student.optimizer.lrr", "1"], "--student.optimizer.lr"),
        (["--teacher.iterations", "0"], "iterations is 0"),
        (["--seed", "one"], "--seed"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_1(
    argv: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        code = train.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 1
    assert words in error_of(capsys)


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--run", "--dry-run", "--seed", "--student.tangent-warmup", "--teacher.ema-std"):
        assert option in text


def test_dry_run_builds_everything_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", *TINY]) == 0
    assert "dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_sample_draws_from_a_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = [str(finished), "--steps", "2", "--num", "20", "--out", str(out)]
    assert sample.main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num", "7"], "multiple of 10"),
        (["--steps", "9"], "steps is 9"),
        (["--out", "/nowhere/grid.png"], "/nowhere/grid.png"),
    ],
)
def test_sample_names_what_is_wrong(
    finished: Path, options: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert sample.main([str(finished), *options]) == 1
    assert words in error_of(capsys)


def test_sample_wants_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sample.main([str(tmp_path)]) == 1
    assert "not a run folder" in error_of(capsys)


@pytest.mark.slow
def test_kill_9_again_and_again_gives_bit_identical_metrics(tmp_path: Path) -> None:
    def command(folder: str) -> list[str]:
        return [sys.executable, "-m", "rcm.train", "--run", str(tmp_path / folder), *TINY]

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = 0
    for limit in (4, 7, 40, 240):  # lines of metrics after which the process is shot
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            path = tmp_path / "killed" / "metrics.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") >= limit:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert killed >= 2
    for name in ("metrics.jsonl", "student.safetensors", "report.json"):
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert resumed.read_bytes() == whole.read_bytes(), name


@pytest.mark.slow
def test_a_file_size_limit_is_met_with_a_message(tmp_path: Path) -> None:
    """A real failing write, half way through the file, in place of a full disk."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "rcm.train", "--run", str(tmp_path / "run"), *TINY]
    result = subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
