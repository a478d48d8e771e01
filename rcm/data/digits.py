"""1797 real handwritten digits of 8×8 pixels, from scikit-learn's wheel, and a classifier for them.

UCI "Optical Recognition of Handwritten Digits" (test part, 13 writers). The data set needs no
download and is small enough to train and distil within minutes on a CPU.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from rcm.data.dataset import Dataset, LabelledDataConfig, halves

FEATURES = 160


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(LabelledDataConfig):
    """The digits; there is nothing to set."""

    name: ClassVar[str] = "digits"
    sample_shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    classes: ClassVar[int] = 10
    size: ClassVar[int] = 1797

    def load(self) -> Dataset:
        return load_digits()

    def classifier(self, data: Dataset) -> "DigitClassifier":
        return train_classifier(data)


def load_digits() -> Dataset:
    """All 1797 digits in the file's order, scaled to mean 0 and standard deviation σd = 1.

    The file is ordered by writer, so that both interleaved halves contain every writer.
    """
    file = datasets.load_digits()
    pixels = torch.from_numpy(file.images).float()[:, None]
    mean, std = pixels.mean().item(), pixels.std(correction=0).item()
    labels = torch.from_numpy(file.target).long()
    return Dataset((pixels - mean) / std, labels, DigitsConfig.classes)


class DigitClassifier(nn.Module):
    """A convolutional classifier; the Fréchet distance uses its last hidden layer."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 16, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, DigitsConfig.classes)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def logits(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, 10)."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, 160), each with mean 0 and variance 1 over the real digits."""
        features: Tensor = (self.body(images) - self.mean) / self.std
        return features


def train_classifier(digits: Dataset, *, steps: int = 400) -> DigitClassifier:
    """Train on the first of the two halves, always from the same seed; takes a few seconds.

    The second half is held out; the accuracy on it is about 98 %. Features are standardised over
    all digits, which gives Fréchet distances a scale: two random halves of the digits are 2.4
    apart, the digits and their blurry class means more than 30. Training runs on the CPU, so that
    every device gets the same classifier.
    """
    device = digits.samples.device
    digits = digits.to(torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitClassifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        train, _ = halves(len(digits.labels))
        for _ in range(steps):
            batch = train[torch.randint(len(train), (128,))]
            loss = functional.cross_entropy(
                model.logits(digits.samples[batch]), digits.labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    features = model.body(digits.samples)
    model.mean.copy_(features.mean(0))
    model.std.copy_(features.std(0).clamp(min=1e-6))
    return model.to(device)
