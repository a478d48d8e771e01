"""On two ranks, JVPs through DDP and FSDP2, and their gradients, equal those of one process.

DDP and FSDP2 average the gradients of the ranks; each rank has a part of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.distributed.data_parallel_cases import (
    DERIVATIVES,
    PARALLEL,
    RANKS,
    REFUSED,
    Derivative,
    Named,
    Parallel,
    network,
    outcomes,
    part_of,
    point_and_direction,
    without_tangents,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

Outcomes = dict[str, dict[str, Named | str]]

# These belong to one rank; all others are gradients of weights.
OF_THIS_RANK = {"out", "tangent", "grad of x", "grad of tx"}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Outcomes]:
    return run_on_ranks(outcomes, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The ranks use one thread, and the order of sums is visible in bfloat16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Cast(nn.Module):
    """A model that casts its weights to another dtype for the computation."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: w.to(self.dtype) for name, w in self.module.named_parameters()}
        return functional_call(self.module, weights, x.to(self.dtype))


def on_one_process(parallel: Parallel, derivative: Derivative) -> list[Named]:
    """The expected results of each rank."""
    parts = [
        derivative(
            Cast(network(parallel.dtype), parallel.computes_in),
            *point_and_direction(parallel.dtype, part_of(rank)),
        )
        for rank in range(RANKS)
    ]
    return [
        {
            name: y if name in OF_THIS_RANK else torch.stack([p[name] for p in parts]).mean(0)
            for name, y in part.items()
        }
        for part in parts
    ]


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda derivative: derivative.__name__)
@pytest.mark.parametrize("parallel", PARALLEL, ids=lambda parallel: parallel.name)
def test_each_rank_agrees_with_one_process(
    parallel: Parallel, derivative: Derivative, by_rank: list[Outcomes]
) -> None:
    if (
        parallel.name.startswith("FSDP2")
        and derivative is not without_tangents
        and torch.__version__ < (2, 13)
    ):
        pytest.skip("torch before 2.13 has no jvp through FSDP2")
    tolerance = 4 * torch.finfo(parallel.dtype).eps
    expected = on_one_process(parallel, derivative)
    for rank, outcome in enumerate(by_rank):
        found = outcome[parallel.name][derivative.__name__]
        assert not isinstance(found, str), found
        assert found.keys() == expected[rank].keys()
        for name, y in expected[rank].items():
            assert found[name].dtype == y.dtype, name
            assert (found[name] - y).norm() <= tolerance * y.norm(), name


@pytest.mark.parametrize("derivative", REFUSED, ids=lambda derivative: derivative.__name__)
def test_unsupported_use_of_ddp_raises(derivative: Derivative, by_rank: list[Outcomes]) -> None:
    for outcome in by_rank:
        error = outcome["refused"][derivative.__name__]
        assert isinstance(error, str), "it did not raise"
        assert REFUSED[derivative] in error
