"""Whole runs of the preset `digits` reach their expected results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("digits")]
Scores = dict[str, dict[str, float]]


def train(folder: Path, *options: str) -> Scores:
    """The scores of a finished run."""
    run = [sys.executable, "-m", "rcm.train", "digits", "--folder", str(folder), *options]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    scores: Scores = json.loads((folder / "report.json").read_text())["scores"]
    return scores


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset and its method, with one report at its end."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train(folder, "--report-every", "1200")
    return folder


def test_the_digits_preset_distils_a_good_student(teacher_run: Path) -> None:
    scores = json.loads((teacher_run / "report.json").read_text())["scores"]
    assert_good(scores)
    # A flow map follows the teacher's ODE.
    assert scores["student, 4 steps"]["frechet_distance"] <= 2.0
    assert scores["student, 4 steps"]["same_noise_rmse"] <= 0.09


def test_rcm_distils_a_good_student(teacher_run: Path, tmp_path: Path) -> None:
    scores = train(tmp_path / "run", "--method", "rcm", "--teacher", str(teacher_run))
    assert_good(scores)


def assert_good(scores: Scores) -> None:
    # One step of the teacher is useless, so the student learned its one-step quality.
    distance = {name: s["frechet_distance"] for name, s in scores.items()}
    assert distance["student, 1 step"] <= 4.0
    assert distance["student, 2 steps"] <= 3.0
    assert distance["teacher, 1 step"] >= 10 * distance["student, 1 step"]
    assert scores["student, 1 step"]["label_agreement"] >= 0.94
    assert scores["student, 2 steps"]["label_agreement"] >= 0.94
