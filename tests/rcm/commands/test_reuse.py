"""Runs that use the teacher or the student of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm import train
from rcm.data.digits import DigitsConfig
from tests.rcm.commands.tiny_run import ANY_METHOD, metrics, one_line_of, start, start_method

pytestmark = pytest.mark.xdist_group("train")


def edit_settings(run: Path, **changed: object) -> None:
    edit(run / "config.json", changed)


def edit_facts(run: Path, **changed: object) -> None:
    edit(run / "data.json", changed)


def edit(path: Path, changed: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.fixture
def other(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "other"))


def test_the_teacher_of_another_run_is_copied_and_not_trained(
    finished: Path, tmp_path: Path
) -> None:
    assert start_method(tmp_path / "run", "scm", finished) == 0
    weights = "teacher.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (finished / weights).read_bytes()
    assert {line["phase"] for line in metrics(tmp_path / "run")} == {"student"}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["teacher"] == json.loads((finished / "config.json").read_text())["teacher"]


def test_a_run_continues_without_the_run_of_its_teacher(other: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start_method(run, "dmd", other, "--student.start", str(other)) == 0
    shutil.rmtree(other)
    assert start_method(run, "dmd", other, "--student.start", str(other)) == 0


def test_a_student_starts_from_the_student_of_another_run(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start_method(run, "dmd", finished, "--student.start", str(finished)) == 0
    start_bytes = (run / "start.safetensors").read_bytes()
    assert start_bytes == (finished / "student.safetensors").read_bytes()
    probes = [line["probe_rmse"] for line in metrics(run) if "probe_rmse" in line]
    assert start_method(tmp_path / "from-teacher", "dmd", finished) == 0
    lines = metrics(tmp_path / "from-teacher")
    assert probes[0] != next(line["probe_rmse"] for line in lines if "probe_rmse" in line)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (shutil.rmtree, (), "is not a run folder: it has no config.json"),
        (
            lambda run: (run / "teacher.safetensors").unlink(),
            (),
            "teacher.safetensors does not exist yet; wait until its run has written it",
        ),
        (
            lambda run: (run / "teacher.safetensors").write_bytes(b"x"),
            (),
            "teacher.safetensors is damaged",
        ),
        (lambda run: edit_settings(run, method="x"), (), "the run's method is 'x'"),
        (
            lambda run: None,
            ("--model.dim", "32"),
            "teacher.safetensors are of another model: model.dim = 16 there, 32 here",
        ),
        (  # the same weights, which compute something else
            lambda run: None,
            ("--model.double-norm",),
            "teacher.safetensors are of another model: model.double_norm = False there, True here",
        ),
        (lambda run: None, ("--student.start", "nowhere"), "nowhere is not a run folder"),
    ],
)
def test_an_unusable_run_is_refused_and_nothing_is_written(
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    spoil,  # type: ignore[no-untyped-def]
    options: tuple[str, ...],
    message: str,
) -> None:
    spoil(other)
    assert start_method(tmp_path / "run", "dmd", other, *options) == 1
    assert message in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_data_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(DigitsConfig, "__eq__", lambda self, other: False)
    assert start_method(tmp_path / "run", "scm", finished) == 1
    assert f"{finished} was trained on DigitsConfig()" in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--teacher", "--student.start"])
def test_weights_for_other_classes_are_refused(
    option: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As after a folder of a class was renamed: as many classes, in another order."""
    edit_facts(other, samples=100, class_names=list("abcdefghij"))
    command = ["--method", "dmd", "--folder", str(tmp_path / "run"), *ANY_METHOD]
    assert train.main([*command, option, str(other)]) == 1
    assert one_line_of(capsys) == (
        f"error: the data are not those that {other} was trained on: their class_names changed; "
        "restore them, or use a run on these data\n"
    )
    assert not (tmp_path / "run").exists()


def test_settings_of_a_teacher_of_another_run_cannot_be_given(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    option = ("--teacher.iterations", "99")
    assert start_method(tmp_path / "run", "scm", finished, *option) == 2
    assert "leave out the options --teacher.*" in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


def test_data_with_nan_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = DigitsConfig().load()
    samples = data.samples.clone()
    samples[3, 0, 0, 0] = torch.nan
    monkeypatch.setattr(DigitsConfig, "load", lambda self: replace(data, samples=samples))
    assert start(tmp_path / "run") == 1
    assert "1 of the 200 samples of digits contain NaN or infinity" in one_line_of(capsys)
