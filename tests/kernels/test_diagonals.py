"""Causal masks whose diagonal meets tiles at every place."""

from __future__ import annotations

import pytest

from tests.kernels.cases import FAMILIES, Case, Family, axes_of
from tests.kernels.problems import lengths_of
from tests.kernels.trial import trial

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
over_families_that_are_quick = pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[pytest.mark.slow] * (x.arch == "sm90")) for x in FAMILIES],
    ids=str,
)


def plainest(family: Family) -> Case:
    """The first kernel of a family, causal over several tiles of keys."""
    case = {name: values[0] for name, values in axes_of(family).items()}
    return {**case, "keys": "several tiles", "causal": "bottom_right"}


def faults_by_diagonal(case: Case, diagonals: range) -> dict[int, list[str]]:
    """By seqlen_k − seqlen_q, where there are faults."""
    _, keys = lengths_of(case)
    faults = {}
    for diagonal in diagonals:
        checked = trial({**case, "queries": str(keys - diagonal)})
        if found := checked.faults(checked.run()):
            faults[diagonal] = found
    return faults


@over_families_that_are_quick
@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_diagonals_beside_the_corners_of_fragments(offset: int, family: Family) -> None:
    case = plainest(family)
    _, keys = lengths_of(case)
    # Rows and columns of tiles are handed out in multiples of 16.
    assert not faults_by_diagonal(case, range(16 + offset, keys, 16))


@pytest.mark.slow
@over_families
def test_every_diagonal(family: Family) -> None:
    case = plainest(family)
    _, keys = lengths_of(case)
    assert not faults_by_diagonal(case, range(-20, keys))
