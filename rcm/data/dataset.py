"""What training and evaluation need of a data set.

Training needs samples by their index, with a condition (Data). Evaluation of labelled data also
needs a classifier (LabelledDataConfig).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Data(Protocol):
    """Samples with conditions, read by index. It has no state, so that a run can continue."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Any]:
        """Samples (n, ...) in units of σd and their conditions, tensors (n, ...), on any device."""
        ...

    def null_condition(self, condition: Any) -> Any:
        """The empty or negative condition, shaped like the condition of a batch."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Labelled samples in memory.

    samples: (n, ...) float32 in units of σd; labels: (n,) int64 in 0..classes - 1.
    """

    samples: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices, device=self.labels.device)
        return self.samples[chosen], self.labels[chosen]

    def subset(self, indices: Tensor) -> Dataset:
        return Dataset(self.samples[indices], self.labels[indices], self.classes)

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.samples.to(device), self.labels.to(device), self.classes)

    def null_condition(self, labels: Tensor) -> Tensor:
        """The label that means "no label": `classes`, for each of (batch,) labels."""
        return torch.full_like(labels, self.classes)


class Classifier(Protocol):
    """A trained classifier; the Fréchet distance is measured in its features."""

    def features(self, samples: Tensor) -> Tensor:
        """(n, ...) -> (n, dim)."""
        ...

    def logits(self, samples: Tensor) -> Tensor:
        """(n, ...) -> (n, classes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(ABC):
    """Settings of a labelled data set; the base class of each data set's own config."""

    name: ClassVar[str]
    sample_shape: ClassVar[tuple[int, ...]]
    classes: ClassVar[int]
    size: ClassVar[int]  # number of samples

    @abstractmethod
    def load(self) -> Dataset:
        """The whole data set, on the CPU."""

    @abstractmethod
    def classifier(self, data: Dataset) -> Classifier:
        """A classifier trained on the first of `halves(n)`, always from the same seed.

        It lives on the device of the data.
        """


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Indices of two interleaved halves: the even and the odd positions."""
    return torch.arange(0, count, 2), torch.arange(1, count, 2)


def evenly_spaced(count: int, total: int) -> Tensor:
    """Indices of about `count` of `total` samples, or of all, ascending: (n,) int64.

    They are pairs of neighbours, so that `halves` of the chosen samples belong to the `halves` of
    all. From data that are sorted by class they take the same fraction of each class.
    """
    if count >= total:
        return torch.arange(total)
    pairs = max(count // 2, 1)
    first = torch.arange(pairs) * (total // 2) // pairs * 2
    return torch.stack([first, first + 1], dim=1).flatten()
