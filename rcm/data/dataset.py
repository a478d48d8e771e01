"""What training and evaluation need of a data set.

Training needs samples by their index, with a condition (Data). Evaluation of labelled data also
needs samples in memory and a classifier (LabelledData, LabelledDataConfig).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rcm.errors import RunError

ROUNDING = 1e-5  # relative: another CPU may round a mean or a standard deviation differently


class Data(Protocol):
    """Samples with conditions, read by index. It has no state, so that a run can continue."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Any]:
        """Samples (n, ...) in units of σd and their conditions, tensors (n, ...), on any device."""
        ...

    def null_condition(self, condition: Any) -> Any:
        """The empty or negative condition, shaped like the condition of a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a run notes of its data, so that its student can be sampled without them."""

    sample_shape: tuple[int, ...]
    classes: int
    samples: int
    """Number of samples."""
    black: float
    """The values of a sample that are drawn as black and as white, in units of σd."""
    white: float
    class_names: tuple[str, ...] = ()
    """By label, if the data set has names."""


OF_NETWORKS = ("sample_shape", "classes", "class_names")
"""The facts that networks depend on: their shapes, and what a label means."""


def require_same_facts(
    noted: DataFacts,
    found: DataFacts,
    *,
    origin: str,
    remedy: str,
    names: Sequence[str] | None = None,
) -> None:
    """Raise RunError if the facts `names` of data, or any, differ from those that a run noted.

    origin: completes "the data are not those that ..."; remedy: what to do.
    """
    names = names or [fact.name for fact in fields(DataFacts)]
    changed = [name for name in names if not _same(getattr(noted, name), getattr(found, name))]
    if changed:
        raise RunError(
            f"the data are not those that {origin}: their {' and '.join(changed)} changed; {remedy}"
        )


def _same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING)
    return a == b


class LabelledData(Data, Protocol):
    """Samples with integer labels. batch() returns float32 samples and (n,) int64 labels."""

    @property
    def facts(self) -> DataFacts: ...

    def subset(self, indices: Tensor) -> Dataset:
        """The samples of these indices (n,), in this order."""
        ...

    def nonfinite(self) -> int:
        """Number of samples that contain NaN or infinity."""
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

    @property
    def facts(self) -> DataFacts:
        low, high = (bound.item() for bound in self.samples.aminmax())  # paper and ink
        return DataFacts(
            sample_shape=tuple(self.samples.shape[1:]),
            classes=self.classes,
            samples=len(self),
            black=high,
            white=low,
        )

    def subset(self, indices: Tensor) -> Dataset:
        return Dataset(self.samples[indices], self.labels[indices], self.classes)

    def nonfinite(self) -> int:
        return int((~self.samples.isfinite()).flatten(1).any(1).sum())

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.samples.to(device), self.labels.to(device), self.classes)

    def null_condition(self, labels: Tensor) -> Tensor:
        """The label that means "no label": `classes`, for each of (batch,) labels."""
        return torch.full_like(labels, self.classes)


class Classifier(Protocol):
    """A trained classifier; the Fréchet distance is measured in its features."""

    def to(self, device: torch.device) -> Self:
        """The classifier on another device."""
        ...

    def features(self, samples: Tensor) -> Tensor:
        """(n, ...) -> (n, dim)."""
        ...

    def logits(self, samples: Tensor) -> Tensor:
        """(n, ...) -> (n, classes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(ABC):
    """Settings of a labelled data set; the base class of each data set's own config."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports and messages call it."""

    @abstractmethod
    def load(self) -> LabelledData:
        """The whole data set, on the CPU. Raises RunError if it cannot be used."""

    @abstractmethod
    def classifier(self, data: LabelledData) -> Classifier:
        """A classifier on the CPU, trained on the first of `halves(n)`, always from one seed."""


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
