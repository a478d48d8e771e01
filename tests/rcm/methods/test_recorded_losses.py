"""Each method computes the same losses as when they were recorded (record.py)."""

import json

import pytest
import torch

from tests.rcm.methods.digits_methods import METHODS
from tests.rcm.methods.record import RECORD, losses

RECORDED = json.loads(RECORD.read_text())
same_torch = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != RECORDED["torch"],
    reason=f"the losses were recorded with torch {RECORDED['torch']}",
)


def test_every_method_is_recorded() -> None:
    assert set(RECORDED["losses"]) == set(METHODS)


@same_torch
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_record(method: str) -> None:
    for iteration, (now, then) in enumerate(
        zip(losses(method), RECORDED["losses"][method], strict=True), start=1
    ):
        assert now == pytest.approx(then, rel=1e-6), f"iteration {iteration}"
