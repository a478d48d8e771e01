"""An interrupted run, repeated, ends in the same bytes as an uninterrupted one."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rcm.training import checkpoint, tensor_shards
from rcm.training.run_folder import read_settings
from rcm.training.tensor_shards import Piece
from tests.rcm.commands.tiny_run import (
    RESULTS,
    TINY,
    Killed,
    assert_equal_up_to_rounding,
    error_of,
    metrics,
    start,
    stop_at,
)

pytestmark = pytest.mark.xdist_group("train")


@pytest.mark.parametrize(
    ("phase", "iteration"),
    [("teacher", 3), ("teacher", 9), ("student", 1), ("student", 7)],
)
def test_a_run_killed_at_any_iteration_continues_to_the_same_metrics(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    iteration: int,
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, phase, iteration, Killed)
        with pytest.raises(Killed):
            start(tmp_path / "run")
    assert start(tmp_path / "run") == 0
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_continues_with_other_micro_batches_to_nearly_the_same_metrics(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 6, Killed)
        with pytest.raises(Killed):
            start(tmp_path / "run")
    assert start(tmp_path / "run", "--accumulation", "2") == 0

    def without_norms_of_terms(folder: Path) -> list[dict]:
        ours = ("grad_norm_", "grad_ratio_")
        return [{n: line[n] for n in line if not n.startswith(ours)} for line in metrics(folder)]

    found, expected = (without_norms_of_terms(run) for run in (tmp_path / "run", finished))
    assert_equal_up_to_rounding(found, expected)
    assert read_settings(tmp_path / "run")["accumulation"] == 2
    capsys.readouterr()
    assert start(tmp_path / "run", "--accumulation", "2", "--seed", "1") == 1
    assert "other settings (seed = 0 there, 1 now)" in error_of(capsys)


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_one_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 1, Killed)
        with pytest.raises(Killed):
            start(folder)
    newest = sorted((folder / "checkpoints").glob("teacher-*"))[-1]
    (shard,) = newest.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    (folder / "teacher.safetensors").unlink()
    assert start(folder) == 0
    assert "damaged" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_run_without_an_intact_checkpoint_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in (folder / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(b"")
    assert start(folder) == 1
    message = error_of(capsys)
    assert "No intact checkpoint is left; delete the run folder" in message
    assert message.endswith("; there is no intact checkpoint")


def test_a_finished_run_repeats_its_table_and_changes_no_metrics(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert start(finished) == 0
    assert "| student, 1 step |" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_teacher_in_the_folder_is_not_trained_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "teacher.safetensors"):
        (folder / name).write_bytes((finished / name).read_bytes())
    assert start(folder) == 0
    assert {line["phase"] for line in metrics(folder)} == {"student"}


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    write = tensor_shards.write_pieces

    def full(path: Path, pieces: dict[str, Piece]) -> str:
        if "student-0000008" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_pieces", full)
        assert start(tmp_path / "run") == 1
    message = error_of(capsys)
    assert "No space left" in message
    assert message.endswith("student-0000004")
    assert start(tmp_path / "run") == 0
    same = (tmp_path / "run" / "metrics.jsonl", finished / "metrics.jsonl")
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.slow
def test_repeated_kill_9_gives_bit_identical_results(tmp_path: Path) -> None:
    def command(folder: str) -> list[str]:
        return [sys.executable, "-m", "rcm.train", "--folder", str(tmp_path / folder), *TINY]

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = 0
    for limit in (4, 7, 240):  # lines of metrics after which the process is shot
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            path = tmp_path / "killed" / "metrics.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") >= limit:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert killed >= 2
    for name in RESULTS:
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert resumed.read_bytes() == whole.read_bytes(), name


@pytest.mark.slow
def test_a_file_size_limit_stops_the_run_with_a_message(tmp_path: Path) -> None:
    """A real failing write, half way through the file, in place of a full disk."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "rcm.train", "--folder", str(tmp_path / "run"), *TINY]
    result = subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.partial"))
