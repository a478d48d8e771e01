"""A student that collapses stops its run with an explanation, and no good checkpoint is lost."""

from pathlib import Path

import pytest

from rcm.training.collapse import CollapseWatch
from rcm.training.trainer import Metrics, Trainer
from tests.rcm.commands.tiny_run import RESULTS, Killed, error_of, metrics, start, stop_at

pytestmark = pytest.mark.xdist_group("train")

LONGER = ("--probe-every", "2", "--checkpoint-every", "3", "--student.iterations", "20")
RISING = {0: 10.0, 2: 9.0, 4: 9.0, 6: 16.0, 8: 9.0, 10: 16.0, 12: 17.0, 14: 18.0}
CONTINUE = ("--on-collapse", "continue")


def measure_as(patch: pytest.MonkeyPatch, rmse: dict[int, float]) -> None:
    """Probes return these values, by iteration; later ones return the last."""
    probe = CollapseWatch.probe

    def scripted(self: CollapseWatch, trainer: Trainer) -> Metrics:
        value = rmse.get(trainer.iteration, list(rmse.values())[-1])
        self.measure = lambda student, check_jvp: {"probe_rmse": value}
        return probe(self, trainer)

    patch.setattr(CollapseWatch, "probe", scripted)


def student_checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("student-*"))


def test_an_absurd_learning_rate_stops_the_run_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = (*LONGER, "--student.optimizer.lr", "1")
    for _ in range(2):
        assert start(tmp_path, *options) == 1
        message = error_of(capsys)
        assert "iteration 6: the student collapsed" in message
        assert "in 3 probes in a row since iteration 2" in message
        assert "the last good checkpoint is " in message
        assert message.endswith("teacher-0000012")
    probes = [line["iteration"] for line in metrics(tmp_path) if "probe_rmse" in line]
    assert probes == [0, 2, 4, 6]


def test_a_stopped_run_resumes_from_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        measure_as(patch, RISING)
        assert start(tmp_path, *LONGER) == 1
    message = error_of(capsys)
    assert "iteration 14: the student collapsed" in message
    assert (
        "exceeded 15, 1.5 times its starting value, in 3 probes in a row since iteration 10, "
        "the last 16, 17, 18." in message
    )
    assert message.endswith("student-0000009")
    assert "the last intact checkpoint" not in message
    assert student_checkpoints(tmp_path) == ["student-0000003", "student-0000009"]
    measure_as(monkeypatch, {0: 10.0, 2: 9.0})
    assert start(tmp_path, *LONGER) == 0
    assert "continuing" in capsys.readouterr().out


def test_a_run_goes_on_after_a_collapse_if_it_shall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measure_as(monkeypatch, RISING)
    assert start(tmp_path, *LONGER) == 1
    assert start(tmp_path, *LONGER, *CONTINUE) == 0
    assert capsys.readouterr().out.count("the student collapsed") == 1
    assert student_checkpoints(tmp_path) == ["student-0000018", "student-0000020"]


def test_a_run_that_went_on_and_then_stops_has_no_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The count of probes is part of a checkpoint."""
    measure_as(monkeypatch, RISING)
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 17, Killed)
        with pytest.raises(Killed):
            start(tmp_path, *LONGER, *CONTINUE)
    assert student_checkpoints(tmp_path) == ["student-0000012", "student-0000015"]
    assert start(tmp_path, *LONGER) == 1
    message = error_of(capsys)
    assert "iteration 16: the student collapsed" in message
    assert "in 4 probes in a row since iteration 10" in message
    assert message.endswith("there is no good checkpoint")


def test_the_last_iteration_is_saved_after_an_exceeding_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_as(monkeypatch, {0: 10.0, **dict.fromkeys(range(2, 20), 9.0), 20: 16.0})
    assert start(tmp_path, *LONGER) == 0
    assert student_checkpoints(tmp_path)[-1] == "student-0000020"


@pytest.mark.parametrize(
    "iteration", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 13))]
)
def test_a_killed_run_continues_to_the_same_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    options = (*LONGER, *CONTINUE)
    assert start(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "student", iteration, Killed)
        with pytest.raises(Killed):
            start(tmp_path / "killed", *options)
    assert start(tmp_path / "killed", *options) == 0
    for name in RESULTS:
        whole, killed = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert killed.read_bytes() == whole.read_bytes(), name


def test_probes_change_nothing_in_the_training(tmp_path: Path) -> None:
    for folder, every in (("often", "1"), ("never", "1000")):
        assert start(tmp_path / folder, *CONTINUE, "--probe-every", every) == 0
    often, never = (tmp_path / folder for folder in ("often", "never"))
    for name in ("student.safetensors", "report.json"):
        assert (often / name).read_bytes() == (never / name).read_bytes(), name
    probes = [line for line in metrics(often) if "probe_rmse" in line]
    assert [line["iteration"] for line in probes] == list(range(11))
    assert [line["iteration"] for line in probes if "jvp_cosine" in line] == [0, 10]
    others = [[line for line in metrics(f) if "probe_rmse" not in line] for f in (often, never)]
    assert others[0] == others[1]
