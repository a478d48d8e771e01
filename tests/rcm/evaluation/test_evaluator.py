"""How a run chooses, draws and pictures the samples that it scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rcm.data.dataset import Dataset
from rcm.evaluation import evaluator
from rcm.evaluation.evaluator import Evaluator
from rcm.evaluation.report import save_grid
from rcm.methods.scm import SCM
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig


class Linear:
    """A classifier whose features are the pixels."""

    def features(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)

    def logits(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)

    def to(self, device: torch.device) -> "Linear":
        return self


def network(x: Tensor, t: Tensor, labels: Tensor, end: Tensor | None = None) -> Tensor:
    return torch.sin(x) * t.view(-1, 1, 1, 1).to(x) + labels.view(-1, 1, 1, 1)


def of_labels(labels: list[int]) -> Evaluator:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(len(labels), 1, 2, 2, generator=generator)
    method = SCM(
        iterations=1,
        batch=1,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.9),
        times=LogNormal(mean=0.0, std=1.0),
        tangent_warmup=1,
    )
    return Evaluator(Dataset(samples, torch.tensor(labels), 30), Linear(), method)


def test_samples_do_not_depend_on_how_many_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = of_labels([0, 1, 2] * 4)
    teacher, student = whole.teacher_samples(network, 4), whole.student_samples(network, 1)
    scores = whole.scores(student, teacher)
    monkeypatch.setattr(evaluator, "CHUNK", 5)
    parts = of_labels([0, 1, 2] * 4)
    torch.testing.assert_close(parts.teacher_samples(network, 4), teacher)
    torch.testing.assert_close(parts.student_samples(network, 1), student)
    assert parts.scores(student, teacher).as_dict() == pytest.approx(scores.as_dict())


def test_a_grid_shows_the_first_samples_of_each_class() -> None:
    rows = of_labels([1, 0, 1, 0, 1, 0, 0]).first_of_each_class(count=3)
    assert rows.tolist() == [[1, 3, 5], [0, 2, 4]]


def test_a_grid_shows_as_many_of_each_class_as_the_smallest_has() -> None:
    assert of_labels([0, 0, 0, 1, 1]).first_of_each_class().tolist() == [[0, 1], [3, 4]]


def test_a_grid_shows_evenly_spaced_classes_of_many() -> None:
    rows = of_labels([label for label in range(30) for _ in range(2)]).first_of_each_class(1, 3)
    assert rows.tolist() == [[0], [20], [40]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_draws_black_and_white_as_the_data_say(channels: int, tmp_path: Path) -> None:
    """Ink on paper has a white that is smaller than its black."""
    images = torch.full((2, channels, 40, 40), 2.0)  # black, then beyond white
    images[1] = -9.0
    if channels == 3:
        images[0, 0] = -1.0  # red
    save_grid(tmp_path / "grid.png", {"": images}, rows=1, black=2.0, white=-1.0)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    height, width, _ = pixels.shape
    left, right = pixels[height * 2 // 3, width // 4], pixels[height * 2 // 3, width * 3 // 4]
    assert left.tolist() == ([255, 0, 0] if channels == 3 else [0, 0, 0])
    assert right.tolist() == [255, 255, 255]
