"""Ulysses and ring attention equal attention in one process, in every derivative."""

from __future__ import annotations

import pytest
import torch

from rcm.distributed.token_split import TokenSplit
from tests.distributed.context_attention_cases import (
    CASES,
    HALF,
    RANKS,
    Case,
    Named,
    in_one_process,
    outcomes,
    own,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Named]]:
    return run_on_ranks(outcomes, RANKS, tmp_path_factory.mktemp("ranks"))


def errors(case: Case, found: list[Named], exact: Named) -> dict[str, float]:
    """The relative error of each result, over all ranks."""
    splits = [TokenSplit(RANKS, rank) for rank in range(RANKS)]
    result = {}
    for name, y in exact.items():
        expected = torch.stack([own(y, case, split) for split in splits])
        difference = torch.stack([of_rank[name] for of_rank in found]) - expected
        result[name] = float(difference.norm() / max(float(y.norm()), 1e-12))
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_attention_in_one_process(case: Case, by_rank: list[dict[str, Named]]) -> None:
    exact = in_one_process(case, torch.float64)
    found = errors(case, [outcome[str(case)] for outcome in by_rank], exact)
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("case", HALF, ids=str)
def test_bfloat16_is_as_accurate_as_in_one_process(
    case: Case, by_rank: list[dict[str, Named]]
) -> None:
    exact = in_one_process(case, torch.float64)
    one = in_one_process(case, torch.bfloat16)
    found = errors(case, [outcome[str(case)] for outcome in by_rank], exact)
    rounding = torch.finfo(torch.bfloat16).eps
    for name, error in found.items():
        of_one = float((one[name] - exact[name]).norm() / exact[name].norm())
        assert error <= max(2 * of_one, rounding), (name, error, of_one)
