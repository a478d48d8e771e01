"""What a user sees of `python -m rcm.sample`."""

from pathlib import Path

import pytest

from rcm import sample
from tests.rcm.commands.tiny_run import one_line_of

pytestmark = pytest.mark.xdist_group("train")


def test_sample_writes_a_grid(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = [str(finished), "--steps", "2", "--num", "20", "--out", str(out)]
    assert sample.main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num", "7"], "--num is 7; it must be a multiple of 10 in 10..10000"),
        (["--num", "0"], "--num is 0; it must be an integer in 1.."),
        (["--num", "-10"], "--num is -10"),
        (["--num", "10010"], "--num is 10010"),
        (["--num", "1e2"], "--num is '1e2'; it must be an integer"),
        (["--steps", "0"], "--steps is 0; it must be an integer in 1.."),
        (["--steps", "9"], "--steps is 9; it must be in 1..4"),
        (["--steps", "inf"], "--steps is 'inf'"),
        (["--seed", "-1"], "--seed is -1; it must be an integer in 0.."),
        (["--seed", "x"], "--seed is 'x'"),
        (["--out", "/nowhere/grid.png"], "--out is /nowhere/grid.png; its folder /nowhere does"),
        (["--out", "/"], "--out is /; it must be a file, not a folder"),
        (["--out", ""], "--out is .; it must be a file"),
        (["--outt", "a"], "perhaps you meant --out"),
    ],
)
def test_sample_rejects_invalid_options(
    finished: Path, options: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert sample.main([str(finished), *options]) == 2
    assert words in one_line_of(capsys)


def test_sample_rejects_a_folder_that_it_cannot_write(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert sample.main([str(finished), "--out", str(tmp_path / "grid.png")]) == 2
    assert f"its folder {tmp_path} cannot be written" in one_line_of(capsys)


def test_sample_rejects_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert sample.main([str(path)]) == 2
        assert f"{path} is not a run folder" in one_line_of(capsys)
    assert sample.main([]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no settings"),
        ('{"preset": "other"}', "the run's preset is 'other'"),
        (
            '{"preset": "digits", "method": "rcm", "shortened": 1}',
            "a setting 'shortened' that this version",
        ),
        (
            '{"preset": "digits", "method": "rcm", "model": 1}',
            "model is 1; it must be a group of settings",
        ),
        ('{"preset": "digits", "method": "rcm", "model": {"heads": 3}}', "heads is 3"),
        (
            '{"preset": "digits", "method": "rcm", "model": {"dim": "64"}}',
            "dim is '64'; it must be an integer",
        ),
    ],
)
def test_sample_rejects_damaged_settings(
    tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert sample.main([str(tmp_path)]) == 1
    assert words in one_line_of(capsys)


def test_sample_waits_for_a_student(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    assert sample.main([str(tmp_path)]) == 1
    assert "wait for the first report" in one_line_of(capsys)
