"""The digits and their classifier."""

import torch
from sklearn.datasets import load_digits as sklearn_digits

from rcm.data.classifier import train_classifier
from rcm.data.dataset import halves
from rcm.data.digits import load_digits
from rcm.evaluation.metrics import frechet_distance, label_agreement


def test_digits_are_in_units_of_their_standard_deviation() -> None:
    data = load_digits()
    assert data.samples.shape == (1797, 1, 8, 8)
    assert data.labels.unique().tolist() == list(range(10))
    assert abs(data.samples.mean()) < 1e-5
    assert abs(data.samples.std(correction=0) - 1) < 1e-5
    ink, paper = data.samples.max(), data.samples.min()
    assert (data.facts.black, data.facts.white) == (ink, paper)


def test_digits_are_the_files_pixels_rescaled() -> None:
    samples, pixels = load_digits().samples[:, 0], torch.from_numpy(sklearn_digits().images).float()
    restored = samples * pixels.std(correction=0) + pixels.mean()
    torch.testing.assert_close(restored, pixels, atol=1e-4, rtol=0)


def test_classifier_recognises_held_out_digits_and_standardises_features() -> None:
    digits = load_digits()
    first, second = train_classifier(digits), train_classifier(digits)
    _, held_out = halves(len(digits.labels))
    logits = first.logits(digits.samples[held_out])
    assert label_agreement(logits, digits.labels[held_out]) > 0.97
    features = first.features(digits.samples)
    torch.testing.assert_close(features, second.features(digits.samples))
    torch.testing.assert_close(features.std(0), torch.ones(features.shape[1]))
    # Real digits are close to real digits and far from their blurry class means.
    baseline = frechet_distance(features[:898], features[898:])
    means = torch.stack([digits.samples[digits.labels == c].mean(0) for c in range(10)])
    assert frechet_distance(first.features(means[digits.labels]), features) > 3 * baseline
