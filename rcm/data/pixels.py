"""Labelled images in memory as they are stored: a byte for each value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm.data.dataset import DataFacts, Dataset

CHUNK = 2**24  # values of which the moments are computed at once
BLACK, WHITE = 0, 255


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Images, each with one of the classes.

    images: (n, channels, side, side) uint8; labels: (n,) int64 in 0..len(class_names) - 1.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all values. Their sums are exact, so they need no file."""
        total = squares = 0.0
        for chunk in self.images.split(max(1, CHUNK // self.images[0].numel())):
            values = chunk.double()
            total += values.sum().item()
            squares += values.square().sum().item()
        mean = total / self.images.numel()
        return mean, max(squares / self.images.numel() - mean**2, 0.0) ** 0.5


class PixelDataset:
    """Pixels as samples (rcm.data.dataset.LabelledData), ordered by class.

    A sample is (pixel - mean) / std, float32, with the mean and the standard deviation of all
    pixels. It is computed when it is read: ImageNet at 64×64 pixels takes 15.7 GB of memory instead
    of 63. Ordered by class, both halves of the data contain every class that has two images.
    """

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self._rows = pixels.labels.argsort(stable=True)
        self._mean, self._std = pixels.moments()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def facts(self) -> DataFacts:
        return DataFacts(
            sample_shape=tuple(self._pixels.images.shape[1:]),
            classes=len(self._pixels.class_names),
            samples=len(self),
            black=(BLACK - self._mean) / self._std,
            white=(WHITE - self._mean) / self._std,
            class_names=self._pixels.class_names,
        )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = self.subset(torch.tensor(indices))
        return chosen.samples, chosen.labels

    def subset(self, indices: Tensor) -> Dataset:
        rows = self._rows[indices]
        samples = (self._pixels.images[rows].float() - self._mean) / self._std
        return Dataset(samples, self._pixels.labels[rows], len(self._pixels.class_names))

    def nonfinite(self) -> int:
        return 0

    def null_condition(self, labels: Tensor) -> Tensor:
        """The label that means "no label": the number of classes, for each of (batch,) labels."""
        return torch.full_like(labels, len(self._pixels.class_names))
