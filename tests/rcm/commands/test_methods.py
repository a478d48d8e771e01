"""Options of `python -m rcm.train` that a method or its guidance rules out, in one line each."""

from pathlib import Path

import pytest

from rcm import train
from tests.rcm.commands.tiny_run import one_line_of

pytestmark = pytest.mark.xdist_group("train")

TINY_MODEL = ("--model.dim", "16", "--model.depth", "1", "--model.heads", "2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--method scm --student.guidance.scale 2",
            "--student.guidance is active, which needs a label that means no label: set "
            "model.null_class",
        ),
        (
            "--method scm --student.guidance.scale 2 --model.null-class",
            "--student.guidance is active, but the teacher is not trained without labels; train "
            "one with --model.null-class --teacher.label-dropout 0.1",
        ),
        (
            "--teacher.label-dropout 0.1",
            "the teacher is trained without labels too, which needs a label that means no label: "
            "set model.null_class",
        ),
        (
            "--method imeanflow --model.no-guidance-input --student.guidance.max-scale 2",
            "--student.guidance is active, which is an input of the student of imeanflow: set "
            "model.guidance_input",
        ),
        (
            "--method sct --student.guidance.scale 2 --model.null-class",
            "--student.guidance is active; it must have scale 1 and no max_scale, because sCT has "
            "no teacher to guide",
        ),
    ],
)
def test_what_does_not_fit_the_method_is_rejected(
    argv: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(argv.split()) == 2
    assert one_line_of(capsys) == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_run_is_guided_only_if_it_was_trained_without_labels(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--method", "scm", "--teacher", str(finished), "--folder", str(tmp_path / "run")]
    options += [*TINY_MODEL, "--model.null-class", "--student.guidance.scale", "2"]
    assert train.main(options) == 2
    assert "the teacher is not trained without labels" in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_was_trained_without_labels_is_guided(
    capsys: pytest.CaptureFixture,
) -> None:
    options = ["--method", "scm", "--dry-run", *TINY_MODEL, "--teacher.batch", "16"]
    options += ["--model.null-class", "--teacher.label-dropout", "0.5"]
    assert train.main([*options, "--student.guidance.scale", "2"]) == 0
    assert "dry run" in capsys.readouterr().out
