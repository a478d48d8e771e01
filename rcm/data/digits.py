"""1797 real handwritten digits of 8×8 pixels, from scikit-learn's wheel.

UCI "Optical Recognition of Handwritten Digits" (test part, 13 writers). The data set needs no
download and is small enough to train and distil within minutes on a CPU.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn import datasets

from rcm.data.classifier import ImageClassifier, train_classifier
from rcm.data.dataset import Dataset, LabelledData, LabelledDataConfig


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(LabelledDataConfig):
    """The digits; there is nothing to set."""

    name: ClassVar[str] = "digits"

    def load(self) -> Dataset:
        return load_digits()

    def classifier(self, data: LabelledData) -> ImageClassifier:
        return train_classifier(data)


def load_digits() -> Dataset:
    """All 1797 digits in the file's order, scaled to mean 0 and standard deviation σd = 1.

    The file is ordered by writer, so that both interleaved halves contain every writer.
    """
    file = datasets.load_digits()
    pixels = torch.from_numpy(file.images).float()[:, None]
    mean, std = pixels.mean().item(), pixels.std(correction=0).item()
    labels = torch.from_numpy(file.target).long()
    return Dataset((pixels - mean) / std, labels, classes=10)
