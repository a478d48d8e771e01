"""A tiny run of every method: it writes its files, can be sampled, and survives a kill."""

from pathlib import Path

import pytest

from rcm import sample
from rcm.run import run
from tests.rcm.commands.tiny_run import RESULTS, Killed, metrics, stop_at
from tests.rcm.methods.digits_methods import METHODS, digits_config

ITERATIONS = 6


@pytest.fixture(
    scope="module",
    params=[pytest.param(method, marks=pytest.mark.xdist_group(method)) for method in METHODS],
)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def finished(method: str, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp(method) / "finished"
    run(folder, digits_config(method, ITERATIONS, teacher_run))
    return folder


def test_a_run_trains_every_network_and_writes_its_files(finished: Path, method: str) -> None:
    for name in (*RESULTS, "teacher.safetensors", "grid.png", "report.md"):
        assert (finished / name).stat().st_size > 0, name
    lines = metrics(finished)
    assert {line["phase"] for line in lines} == {"student"}
    assert max(line["iteration"] for line in lines) == ITERATIONS
    trained = {key for line in lines for key in line if key.endswith("loss")}
    assert "loss" in trained
    assert ("critic_loss" in trained) == ("critic" in digits_config(method, 4).student.roles())


def test_the_student_of_a_run_can_be_sampled(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert sample.main([str(finished), "--steps", "2", "--num", "10", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_bytes(
    finished: Path, method: str, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits_config(method, ITERATIONS, teacher_run)
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 4, Killed)  # after the checkpoint of iteration 2
        with pytest.raises(Killed):
            run(tmp_path / "run", config)
    run(tmp_path / "run", config)
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name
