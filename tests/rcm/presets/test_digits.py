"""A whole run of the preset `digits` reaches its expected results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_digits_preset_distils_a_good_student(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rcm.train", "--run", str(tmp_path / "run")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    # One step of the teacher is useless, so the student learned its one-step quality.
    distance = {name: s["frechet_distance"] for name, s in scores.items()}
    assert distance["student, 1 step"] <= 4.0
    assert distance["student, 2 steps"] <= 3.0
    assert distance["teacher, 1 step"] >= 10 * distance["student, 1 step"]
    assert scores["student, 1 step"]["label_agreement"] >= 0.94
    assert scores["student, 2 steps"]["label_agreement"] >= 0.94
