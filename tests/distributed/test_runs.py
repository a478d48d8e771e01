"""A run computes the same on every layout of its ranks, and on others after it was stopped.

The loss of consistency is nearly 100 whatever the student does. So all metrics are compared, among
them the norms of tangent, derivative and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rcm.distributed.processes import processes
from rcm.methods.rcm import RCM
from rcm.methods.tangents import Passes
from rcm.training.method import Step
from rcm.training.trainer import Metrics
from tests.distributed.ranks import run_on_ranks
from tests.distributed.run_cases import (
    BFLOAT16,
    BFLOAT16_END,
    DMD_START,
    FIRST_UPDATES,
    LONG_ON_TWO,
    PRODUCT_ON_FOUR,
    PRODUCT_ON_TWO,
    STOP,
    TWO_RANKS,
    WAN_ALONE,
    WAN_SHARD,
    WAN_SHARD_4,
    Case,
    Named,
    alone,
    long_runs,
    on_one_rank_afterwards,
    on_one_rank_before,
    on_two_ranks,
    opened,
    product_on_four_ranks,
    product_on_one_rank,
    product_on_two_ranks,
)

pytestmark = pytest.mark.xdist_group("ranks")

TOLERANCE = 1e-5
Measured = dict[str, Any]
ids = {"ids": lambda case: case.name}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def by_rank(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """What each of two ranks measured, after one process alone and before another one."""
    path = tmp_path_factory.mktemp("runs")
    with processes("cpu", always_group=True):
        before = on_one_rank_before(path)
    ranks = run_on_ranks(partial(on_two_ranks, path), 2, tmp_path_factory.mktemp("ranks"))
    with processes("cpu", always_group=True):
        afterwards = on_one_rank_afterwards(path)
    return [before | afterwards | found for found in ranks]


# ---- comparisons -------------------------------------------------------------------------------


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def worst(found: Named, expected: Named) -> float:
    """The largest distance of a tensor."""
    assert found.keys() == expected.keys()
    return max(distance(found[name], expected[name]) for name in expected)


def worst_metric(found: Sequence[Metrics], expected: Sequence[Metrics], names: str = "") -> float:
    """The largest relative deviation, in any iteration, of a metric whose name contains `names`."""
    deviations = [0.0]
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys()
        for name, value in there.items():
            if names in name and here[name] != value:
                deviations.append(abs(here[name] - value) / abs(value) if value else math.inf)
    return max(deviations)


def without_terms(metrics: Sequence[Metrics]) -> list[Metrics]:
    """Without the gradients of single losses, which are measured without accumulation only."""
    single = ("grad_norm_", "grad_ratio_")
    return [{n: x for n, x in one.items() if not n.startswith(single)} for one in metrics]


def check_equal(case: Case, found: Measured, expected: Measured) -> None:
    """Metrics, gradients and averaged weights are those of one process, up to rounding."""
    metrics = expected["metrics"]
    if case.accumulation > 1:
        metrics = without_terms(metrics)
    assert worst_metric(found["metrics"], metrics) <= TOLERANCE
    for kind in FIRST_UPDATES.values():
        assert worst(found["gradients"][kind], expected["gradients"][kind]) <= TOLERANCE, kind
    assert worst(found["weights"], expected["weights"]) <= TOLERANCE


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TWO_RANKS, **ids)
def test_run_equals_that_of_one_process(case: Case, by_rank: list[Measured]) -> None:
    for rank in by_rank:
        check_equal(case, rank[case.name], rank[case.alone.name])
        assert rank[case.name]["metrics"] == by_rank[0][case.name]["metrics"]


@pytest.mark.parametrize("case", BFLOAT16, **ids)
def test_ranks_round_to_bfloat16_no_worse_than_one_process(
    case: Case, by_rank: list[Measured]
) -> None:
    """The distance to one process is at most twice that of bfloat16 to float32 there."""
    for rank in by_rank:
        exact, low, found = rank[WAN_ALONE.name], rank[case.alone.name], rank[case.name]
        for names in ("", "jvp_norm"):
            allowed = 2 * worst_metric(low["metrics"], exact["metrics"][:BFLOAT16_END], names)
            assert worst_metric(found["metrics"], low["metrics"], names) <= allowed
        for kind in FIRST_UPDATES.values():
            allowed = 2 * worst(low["gradients"][kind], exact["gradients"][kind])
            assert worst(found["gradients"][kind], low["gradients"][kind]) <= allowed, kind


@pytest.mark.parametrize("passes", get_args(Passes))
def test_residual_in_bfloat16_is_the_normalised_tangent(
    passes: Passes, one_thread: None, tmp_path: Path
) -> None:
    """What the passes of F round differently is no part of it."""
    case = replace(WAN_ALONE, passes=passes, dtype="bfloat16")
    with processes("cpu", always_group=True), opened(case, tmp_path / "run") as (_, trainer):
        method = trainer.method
        assert isinstance(method, RCM)
        batch = trainer.batches.read(0, range(method.batch))
        loss = method.consistency(Step(DMD_START, batch, trainer.networks, {}))
    g = loss.diagnostics["tangent_norm"]
    expected = method.consistency_weight * (g / (g + method.tangent_norm_eps)) ** 2
    torch.testing.assert_close(loss.value.detach(), expected)


# ---- stopped runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"), [(WAN_ALONE, "alone, stopped"), (WAN_SHARD, "shard, stopped")]
)
def test_run_repeats_bit_for_bit(case: Case, name: str, by_rank: list[Measured]) -> None:
    for rank in by_rank:
        assert rank[name]["metrics"] == rank[case.name]["metrics"][:STOP]


@pytest.mark.parametrize(
    ("case", "name"),
    [(WAN_ALONE, "alone -> alone"), (WAN_SHARD, "shard -> shard")],
)
def test_stopped_run_continues_bit_for_bit(case: Case, name: str, by_rank: list[Measured]) -> None:
    for rank in by_rank:
        found, expected = rank[name], rank[case.name]
        assert found["metrics"] == expected["metrics"][STOP:]
        assert found["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(found["weights"][n], w) for n, w in expected["weights"].items())


@pytest.mark.parametrize("name", ["alone -> ulysses", "shard -> ulysses", "shard -> alone"])
def test_stopped_run_continues_on_another_layout(name: str, by_rank: list[Measured]) -> None:
    for rank in by_rank:
        found, expected = rank[name], rank[WAN_ALONE.name]
        assert worst_metric(found["metrics"], expected["metrics"][STOP:]) <= TOLERANCE
        assert worst(found["weights"], expected["weights"]) <= TOLERANCE


# ---- presets × layouts × passes ----------------------------------------------------------------


@pytest.fixture(scope="module")
def product_alone(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    with processes("cpu", always_group=True):
        return product_on_one_rank(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def long_alone(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    with processes("cpu", always_group=True):
        return long_runs(alone(LONG_ON_TWO), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def product_on_two(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    function = partial(product_on_two_ranks, tmp_path_factory.mktemp("runs"))
    return run_on_ranks(function, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def product_on_four(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    function = partial(product_on_four_ranks, tmp_path_factory.mktemp("runs"))
    return run_on_ranks(function, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT_ON_TWO, **ids)
def test_any_run_on_two_ranks_equals_that_of_one_process(
    case: Case, product_on_two: list[Measured], product_alone: Measured
) -> None:
    for rank in product_on_two:
        check_equal(case, rank[case.name], product_alone[case.alone.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_ON_TWO, **ids)
def test_long_run_on_two_ranks_equals_that_of_one_process(
    case: Case, product_on_two: list[Measured], long_alone: Measured
) -> None:
    for rank in product_on_two:
        check_equal(case, rank[case.name], long_alone[case.alone.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT_ON_FOUR, **ids)
def test_any_run_on_four_ranks_equals_that_of_one_process(
    case: Case, product_on_four: list[Measured], product_alone: Measured
) -> None:
    for rank in product_on_four:
        check_equal(case, rank[case.name], product_alone[case.alone.name])


@pytest.mark.slow
def test_run_on_four_ranks_repeats_bit_for_bit(product_on_four: list[Measured]) -> None:
    for rank in product_on_four:
        assert rank["repeated"]["metrics"] == rank[WAN_SHARD_4.name]["metrics"]
