"""A run folder is used by one run with one set of settings, one process at a time."""

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rcm import train
from rcm.errors import OptionError, RunError
from rcm.presets import PRESETS
from rcm.training.run_folder import delete_run_folder
from tests.rcm.commands.tiny_run import RESULTS, TINY, Killed, error_of, start, stop_at

pytestmark = pytest.mark.xdist_group("train")


def test_a_folder_of_other_settings_is_rejected(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(finished, "--student.optimizer.lr", "0.5") == 1
    assert "student.optimizer.lr = 0.0001 there, 0.5 now" in error_of(capsys)


def test_a_folder_of_another_preset_is_rejected(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    digits = PRESETS["digits"]
    other = replace(digits, config=lambda method: replace(digits.config(method), preset="other"))
    monkeypatch.setitem(PRESETS, "other", other)
    assert train.main(["other", "--folder", str(finished), *TINY]) == 1
    assert "preset = digits there, other now" in error_of(capsys)


def test_a_folder_with_other_files_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert start(tmp_path) == 2
    assert "thesis.tex" in error_of(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_the_config_of_something_else_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert start(tmp_path) == 1
    assert "model_type = bert there" in error_of(capsys)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_a_folder_that_cannot_be_written_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file") == 2
    assert "file is not a folder; choose another with --folder" in error_of(capsys)
    assert start(tmp_path / "file" / "run") == 2
    assert "cannot be written (Not a directory); choose another" in error_of(capsys)
    assert start(tmp_path / "new" / ("n" * 300)) == 2
    assert "cannot be written (File name too long)" in error_of(capsys)

    def denied(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", denied)
        assert start(tmp_path / "run") == 2
    assert "cannot be written (Permission denied)" in error_of(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", ["grids", "checkpoints"])
def test_a_run_folder_with_a_file_in_place_of_a_folder_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, folder: str
) -> None:
    stop_at(monkeypatch, "teacher", 1, Killed)
    with pytest.raises(Killed):
        start(tmp_path)
    (tmp_path / folder).rmdir()
    (tmp_path / folder).write_text("")
    assert start(tmp_path) == 2
    assert "cannot be written (File exists)" in error_of(capsys)


def test_a_run_that_ended_before_its_first_checkpoint_accepts_other_settings(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, "teacher", 3, Killed)
        with pytest.raises(Killed):
            start(folder, "--seed", "5")
    (folder / "config.json.partial").write_text("{")
    assert start(folder) == 0
    for name in RESULTS:
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("finishes", ["a checkpoint", "the teacher"])
def test_a_run_with_something_to_continue_rejects_other_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    finishes: str,
) -> None:
    stop_at(monkeypatch, "teacher", 6, Killed)
    with pytest.raises(Killed):
        start(tmp_path)
    if finishes == "the teacher":
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "teacher.safetensors").write_text("")
    assert start(tmp_path, "--seed", "5") == 1
    assert "seed = 0 there, 5 now" in error_of(capsys)


def test_a_folder_in_use_is_rejected(finished: Path, capsys: pytest.CaptureFixture) -> None:
    with open(finished / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert start(finished) == 1
    assert "another process" in error_of(capsys)


def test_deleting_a_run_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is in use by another process"):
            delete_run_folder(folder)
    delete_run_folder(folder)
    assert not folder.exists()
    delete_run_folder(folder)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match=r"it contains thesis\.tex"):
        delete_run_folder(tmp_path)


def test_a_dry_run_of_ranks_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What a killed one left has its settings, and would be continued."""
    stale = tmp_path / ".run.dry-run"
    monkeypatch.setattr(train.Launch, "from_environment", lambda: "ranks")
    with train._dry_run_folder(tmp_path / "run") as folder:
        assert folder == stale
        stale.mkdir()
        (stale / "config.json").write_text("{}")
    assert not stale.exists()
    stale.mkdir()
    (stale / "config.json").write_text("{}")
    with train._dry_run_folder(tmp_path / "run"):
        assert not stale.exists()


def test_one_rank_prints_an_error_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train.main(["--teacher", "nowhere"]) == 1
        assert train.main(["--seed", "x"]) == 2
        assert capsys.readouterr().err.count("\n") == 2 * lines
