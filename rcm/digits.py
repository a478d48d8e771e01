"""1797 real handwritten digits of 8×8 pixels, from scikit-learn's wheel, and features for them.

UCI "Optical Recognition of Handwritten Digits" (test part, 13 writers): a data set that needs no
download, on which a distillation runs from start to a number within minutes on a CPU.
"""

from dataclasses import dataclass

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

SIZE = 8
CLASSES = 10
FEATURES = 160


@dataclass(frozen=True)
class Digits:
    """images: (1797, 1, 8, 8) float32 with mean 0 and standard deviation 1 over all pixels, so
    that σd = 1; labels: (1797,) int64. A pixel of the file, 0..16, is images * std + mean."""

    images: Tensor
    labels: Tensor
    mean: float
    std: float


def load_digits() -> Digits:
    """All 1797 digits, in the file's order."""
    file = datasets.load_digits()
    pixels = torch.from_numpy(file.images).float()[:, None]
    mean, std = pixels.mean().item(), pixels.std(correction=0).item()
    return Digits((pixels - mean) / std, torch.from_numpy(file.target).long(), mean, std)


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Indices of two interleaved halves (the file is ordered by writer, so both have them all)."""
    return torch.arange(0, count, 2), torch.arange(1, count, 2)


class DigitFeatures(nn.Module):
    """A convolutional classifier; its last hidden layer is the space of the Fréchet distance."""

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
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def logits(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, 10)."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> features (n, 160), each of mean 0 and variance 1 over the real digits."""
        return (self.body(images) - self.mean) / self.std


def train_features(digits: Digits, *, steps: int = 400) -> DigitFeatures:
    """Train on the first of the two halves, always from the same seed; a few seconds.

    The second half is never seen, so accuracy on it is honest (about 98 %). Features are
    standardised over all digits, which gives Fréchet distances a scale: two random halves of the
    digits are 2.4 apart, digits and their blurry class means more than 30.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitFeatures()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        train, _ = halves(len(digits.labels))
        for _ in range(steps):
            batch = train[torch.randint(len(train), (128,))]
            loss = functional.cross_entropy(
                model.logits(digits.images[batch]), digits.labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    features = model.body(digits.images)
    model.mean.copy_(features.mean(0))
    model.std.copy_(features.std(0).clamp(min=1e-6))
    return model
