"""`make demo-scale` compares a run that was killed and resumed with an undisturbed one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.demo_scale import compare, demo

pytestmark = pytest.mark.xdist_group("ranks")

LOSSES = [("student", 100.0), ("critic", 50.0), ("student", 99.0)]


@pytest.mark.parametrize(
    ("loss", "status"), [(50.0, 0), (50.0004, 0), (50.0006, 1), (math.nan, 1), (math.inf, 1)]
)
def test_the_status_is_1_if_a_loss_differs(loss: float, status: int) -> None:
    assert compare([LOSSES[0], ("critic", loss), LOSSES[2]], LOSSES) == status


def test_a_missing_iteration_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare(LOSSES[:2], LOSSES)


@pytest.mark.slow
def test_the_demonstration(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert demo(tmp_path, iterations=12) == 0
    output = capfd.readouterr().out
    assert "killed after iteration" in output
    assert "\nIterations 1 to 5 are those of 2 ranks.\n" in output
    assert len(output.partition("iteration  network")[2].splitlines()) == 1 + 12 + 2
