"""Causal masks, with the diagonal at every place relative to the tiles."""

from __future__ import annotations

import pytest

from tests.kernels.cases import FAMILIES, Case, Family, axes_of
from tests.kernels.kernel_case import kernel_test
from tests.kernels.problems import lengths_of

QUICK = [family for family in FAMILIES if family.arch == "sm80"]
PARTS = 8  # of the diagonals of a family, one test each


def causal_case(family: Family) -> Case:
    """The first kernel of a family, causal over several tiles of keys."""
    case = {name: values[0] for name, values in axes_of(family).items()}
    return {**case, "keys": "several tiles", "causal": "bottom_right"}


def faults_by_diagonal(case: Case, diagonals: range) -> dict[int, list[str]]:
    """The faults, by diagonal (seqlen_k − seqlen_q)."""
    _, keys = lengths_of(case)
    faults = {}
    for diagonal in diagonals:
        test = kernel_test({**case, "queries": str(keys - diagonal)})
        if found := test.faults(test.run()):
            faults[diagonal] = found
    return faults


@pytest.mark.parametrize("family", QUICK, ids=str)
@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_diagonals_near_fragment_corners(offset: int, family: Family) -> None:
    case = causal_case(family)
    _, keys = lengths_of(case)
    # Fragments start at multiples of 16 rows and columns.
    assert not faults_by_diagonal(case, range(16 + offset, keys, 16))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_diagonal(family: Family, part: int) -> None:
    case = causal_case(family)
    _, keys = lengths_of(case)
    assert not faults_by_diagonal(case, range(-20 + part, keys, PARTS))
