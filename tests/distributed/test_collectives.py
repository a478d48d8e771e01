"""Every derivative of a collective equals that of the same map in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.collectives_cases import (
    NAMES,
    RANKS,
    in_one_process,
    inputs,
    outcomes,
    results,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(outcomes, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_every_derivative_equals_that_of_one_process(
    name: str, by_rank: list[dict[str, Any]]
) -> None:
    expected = results(lambda xs: in_one_process(name, xs), **inputs(name))
    for rank, outcome in enumerate(by_rank):
        found = outcome[name]["results"]
        assert found.keys() == expected.keys()
        for kind, all_ranks in expected.items():
            for y, ys in zip(found[kind], all_ranks, strict=True):
                y_of_rank = ys[rank] if len(ys) == RANKS else ys[0]
                torch.testing.assert_close(y, y_of_rank, rtol=1e-13, atol=1e-13, msg=kind)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_their_tangents_are_one_message(
    name: str, by_rank: list[dict[str, Any]]
) -> None:
    assert [outcome[name]["messages"] for outcome in by_rank] == [1] * RANKS


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_moved_unchanged(name: str, by_rank: list[dict[str, Any]]) -> None:
    rounded = [x.bfloat16().double() for x in inputs(name)["x"]]
    for rank, outcome in enumerate(by_rank):
        for y, ys in zip(
            outcome[name]["half precision"], in_one_process(name, rounded), strict=True
        ):
            assert torch.equal(y, ys[rank] if len(ys) == RANKS else ys[0])


def test_what_does_not_fit_raises_on_every_rank(by_rank: list[dict[str, Any]]) -> None:
    for outcome in by_rank:
        assert outcome["errors"]["heads"].startswith("ValueError: dimension 2 of a tensor")
        assert "one dtype, got torch.float32, torch.float64" in outcome["errors"]["dtypes"]
