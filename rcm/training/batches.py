"""The samples and the random numbers of each iteration, as functions of (seed, iteration, sample).

They depend neither on the number of ranks nor on earlier iterations: a run computes the same losses
on any number of ranks, and continues from the iteration number alone. Random numbers are drawn on
the CPU, so that every device gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map, tree_map_only

from rcm.data.dataset import Data
from rcm.errors import RunError

ORDER, SHARED, SAMPLES = 0, 1, 2  # what a seed is for


@dataclass(frozen=True)
class Batch:
    """Some samples of a batch: x0 (n, ...), their condition and their random numbers."""

    x0: Tensor
    condition: Any
    positions: range
    """Where these samples are in the whole batch, of `size` samples."""
    size: int
    generators: Sequence[Generator]
    """For noise: one for each of these samples."""
    shared: Generator
    """For all else: the same on all ranks, which draw alike."""
    null_condition: Callable[[Any], Any]

    def draw(self, distribution: Callable[[int, Generator], Any]) -> Any:
        """distribution(count, generator) for these samples, on the device of x0.

        It draws for the whole batch and returns tensors (..., count), one or a tuple of them, of
        which these samples get theirs.
        """
        own = slice(self.positions.start, self.positions.stop)
        drawn = distribution(self.size, self.shared)
        return tree_map(lambda tensor: tensor[..., own].to(self.x0.device), drawn)

    def noise(self) -> Tensor:
        """Standard normal noise, like x0."""
        shape, dtype = self.x0.shape[1:], self.x0.dtype
        drawn = [torch.randn(shape, generator=g, dtype=dtype) for g in self.generators]
        return torch.stack(drawn).to(self.x0.device)


class Batches:
    """Shuffled batches of a data set, epoch after epoch."""

    def __init__(self, data: Data, batch: int, seed: int, device: torch.device) -> None:
        if batch > len(data):
            raise RunError(
                f"the batch is {batch}; it must be at most {len(data)}, the number of samples"
            )
        self.data, self.batch, self.seed, self.device = data, batch, seed, device
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def read(self, iteration: int, positions: range) -> Batch:
        """The samples at some positions of the batch of iteration 0, 1, ..."""
        x0, condition = self.data.batch(self.indices(iteration, positions))
        seeds = self._seeds(self.batch, SAMPLES, iteration)
        return Batch(
            x0.to(self.device),
            tree_map_only(Tensor, lambda tensor: tensor.to(self.device), condition),
            positions,
            self.batch,
            [Generator().manual_seed(seeds[position]) for position in positions],
            self._generator(SHARED, iteration),
            self.data.null_condition,
        )

    def indices(self, iteration: int, positions: range) -> list[int]:
        """Where these samples are in the data set."""
        numbers = [iteration * self.batch + position for position in positions]
        return [int(self._order(n // len(self.data))[n % len(self.data)]) for n in numbers]

    def _order_of_epoch(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.data), generator=self._generator(ORDER, epoch))

    def _generator(self, *purpose: int) -> Generator:
        (seed,) = self._seeds(1, *purpose)
        return Generator().manual_seed(seed)

    def _seeds(self, count: int, *purpose: int) -> list[int]:
        seeds: list[int] = (
            np.random.SeedSequence([self.seed, *purpose]).generate_state(count).tolist()
        )
        return seeds
