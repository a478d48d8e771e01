"""The samples that a grid shows, and how it draws them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.data.dataset import Dataset
from rcm.evaluation.evaluator import Evaluator
from rcm.evaluation.report import save_grid
from tests.rcm.evaluation.samplers import SETTINGS, FirstElement, OneTime


def of_labels(labels: list[int]) -> Evaluator:
    data = Dataset(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels), 30)
    return Evaluator(data, FirstElement(), OneTime(**SETTINGS))


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
