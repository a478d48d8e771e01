"""Shuffled batches of a data set that lives in memory, and the generator of a method's noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rcm.data.dataset import Dataset


class Batches:
    """Endless shuffled batches; generator and tensors live on the device of the data."""

    def __init__(self, data: Dataset, batch: int, seed: int) -> None:
        if batch > len(data.labels):
            raise ValueError(f"a batch of {batch} is larger than the data ({len(data.labels)})")
        self.data, self.batch = data, batch
        self.device = data.samples.device
        self.generator = Generator(self.device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64, device=self.device)

    def next(self) -> tuple[Tensor, Tensor]:
        """Samples (batch, ...) and labels (batch,)."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(
                len(self.data.labels), generator=self.generator, device=self.device
            )
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.data.samples[chosen], self.data.labels[chosen]

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of that shape and dtype."""
        return torch.randn(
            like.shape, generator=self.generator, device=self.device, dtype=like.dtype
        )

    def integer(self, low: int, high: int) -> int:
        """A random integer in [low, high]."""
        drawn = torch.randint(low, high + 1, (), generator=self.generator, device=self.device)
        return int(drawn)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.order = state["order"].to(self.device)
