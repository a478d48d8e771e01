"""Whole runs of the preset `digits` reach their expected results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.methods import command

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("digits")]
Scores = dict[str, dict[str, float]]


def train(folder: Path, *options: str) -> Scores:
    """The scores of a finished run."""
    run = [sys.executable, "-m", "rcm.train", "digits", "--run", str(folder), *options]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    scores: Scores = json.loads((folder / "report.json").read_text())["scores"]
    return scores


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset as it is."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train(folder)
    return folder


def test_the_digits_preset_distils_a_good_student(teacher_run: Path) -> None:
    scores = json.loads((teacher_run / "report.json").read_text())["scores"]
    # One step of the teacher is useless, so the student learned its one-step quality.
    distance = {name: s["frechet_distance"] for name, s in scores.items()}
    assert distance["student, 1 step"] <= 4.0
    assert distance["student, 2 steps"] <= 3.0
    assert distance["teacher, 1 step"] >= 10 * distance["student, 1 step"]
    assert scores["student, 1 step"]["label_agreement"] >= 0.94
    assert scores["student, 2 steps"]["label_agreement"] >= 0.94


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_short_runs_of_the_methods_reach_their_quality(
    teacher_run: Path, tmp_path: Path, seed: int
) -> None:
    def distilled(method: str) -> Scores:
        return train(tmp_path / f"{method}-{seed}", *command(method, seed, teacher_run, tmp_path))

    scm = distilled("scm")
    assert scm["student, 1 step"]["frechet_distance"] <= 4.5
    assert scm["student, 1 step"]["label_agreement"] >= 0.91
    assert scm["student, 1 step"]["same_noise_rmse"] <= 0.24
    for method in ("ayf", "meanflow"):
        scores = distilled(method)
        assert scores["student, 4 steps"]["frechet_distance"] <= 2.4, method
        assert scores["student, 4 steps"]["same_noise_rmse"] <= 0.09, method
    dmd = distilled("dmd")  # continues the student of scm
    teacher = scm["teacher, 32 steps"]["diversity"]
    lost = scm["student, 1 step"]["diversity"] - dmd["student, 1 step"]["diversity"]
    assert lost / teacher >= 0.05
