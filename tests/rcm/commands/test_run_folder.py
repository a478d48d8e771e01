"""A run folder is used by one run with one set of settings, one process at a time."""

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest

from rcm import train
from rcm.presets import PRESETS
from tests.rcm.commands.tiny_run import TINY, error_of, start

pytestmark = pytest.mark.xdist_group("train")


def test_a_folder_of_other_settings_is_rejected(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(finished, "--student.optimizer.lr", "0.5") == 1
    assert "student.optimizer.lr = 0.0001 there, 0.5 now" in error_of(capsys)


def test_a_folder_of_another_preset_is_rejected(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(PRESETS, "other", lambda: replace(PRESETS["digits"](), preset="other"))
    assert train.main(["other", "--run", str(finished), *TINY]) == 1
    assert "preset = digits there, other now" in error_of(capsys)


def test_a_folder_with_other_files_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert start(tmp_path) == 1
    assert "thesis.tex" in error_of(capsys)
    assert [p.name for p in tmp_path.iterdir() if p.name != "lock"] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file" / "run") == 1
    assert "cannot be written" in error_of(capsys)


def test_a_folder_in_use_is_rejected(finished: Path, capsys: pytest.CaptureFixture) -> None:
    with open(finished / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert start(finished) == 1
    assert "another process" in error_of(capsys)
