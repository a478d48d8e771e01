"""What training and evaluation need of a data set: labelled samples and a classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """samples: (n, ...) float32 in units of σd; labels: (n,) int64 in 0..classes - 1."""

    samples: Tensor
    labels: Tensor
    classes: int

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
class DataConfig(ABC):
    """Settings of a data set; the base class of each data set's own config."""

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
