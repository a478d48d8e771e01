"""Samples and random numbers are functions of seed, iteration and position in the batch alone."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rcm.data.dataset import Dataset
from rcm.errors import RunError
from rcm.time_sampling import LogNormal
from rcm.training.batches import Batch, Batches

CPU = torch.device("cpu")


def batches(seed: int = 0, samples: int = 10, batch: int = 4) -> Batches:
    x0 = torch.arange(samples, dtype=torch.float32).view(-1, 1, 1).expand(-1, 2, 3)
    return Batches(Dataset(x0, torch.arange(samples), samples), batch, seed, CPU)


def contents(batch: Batch) -> list[Tensor]:
    """Everything that a batch gives, in the order of drawing."""
    times = batch.draw(LogNormal(mean=0.0, std=1.0))
    return [batch.x0, *tree_leaves(batch.condition), times, batch.noise(), batch.noise()]


def test_parts_of_a_batch_are_those_of_the_whole_batch() -> None:
    whole = contents(batches().read(7, range(4)))
    parts = [contents(batches().read(7, positions)) for positions in (range(1), range(1, 4))]
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_an_iteration_does_not_depend_on_those_before() -> None:
    reading = batches()
    for iteration in range(5):
        contents(reading.read(iteration, range(4)))
    for a, b in zip(
        contents(reading.read(5, range(4))), contents(batches().read(5, range(4))), strict=True
    ):
        assert torch.equal(a, b)


def test_every_sample_appears_once_in_each_epoch() -> None:
    reading = batches(samples=10, batch=4)
    seen = [i for iteration in range(5) for i in reading.indices(iteration, range(4))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_seeds_iterations_and_samples_have_different_random_numbers() -> None:
    first, again = batches(), batches(seed=1)
    noises = [
        *first.read(0, range(4)).noise(),
        *first.read(1, range(4)).noise(),
        *again.read(0, range(4)).noise(),
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 12


def test_draws_of_several_tensors_keep_their_leading_dimensions() -> None:
    batch = batches().read(0, range(4))
    pair, rows = batch.draw(
        lambda count, generator: (
            torch.rand(count, generator=generator),
            torch.rand(3, count, generator=generator),
        )
    )
    assert pair.shape == (4,)
    assert rows.shape == (3, 4)


def test_a_batch_larger_than_the_data_raises() -> None:
    with pytest.raises(RunError, match="the batch is 11; it must be at most 10"):
        batches(batch=11)
