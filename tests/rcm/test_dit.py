"""The digits' network and data."""

import pytest
import torch

from rcm.digits import halves, load_digits, train_features
from rcm.dit import DiT
from rcm.metrics import frechet_distance, label_agreement


def awake(**options: int | bool) -> DiT:
    """A DiT without the zeros it starts from, so that every path through it matters."""
    net = DiT(**options).double()  # type: ignore[arg-type]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_derivative_along_x_and_t_is_the_difference_quotient() -> None:
    net = awake()
    x, tx = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    t, tt = torch.rand(2, 3, dtype=torch.float64)
    labels, h = torch.tensor([0, 5, 9]), 1e-5
    _, derivative = torch.func.jvp(lambda x, t: net(x, t, labels), (x, t), (tx, tt))
    quotient = (net(x + h * tx, t + h * tt, labels) - net(x - h * tx, t - h * tt, labels)) / (2 * h)
    assert derivative.norm() > 1e-2
    torch.testing.assert_close(derivative, quotient, atol=1e-7, rtol=1e-6)


def test_it_starts_at_zero_and_every_parameter_learns() -> None:
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    assert not DiT()(x, t, labels).any()
    net = awake().float()
    net(x, t, labels).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_size_of_the_default() -> None:
    assert sum(p.numel() for p in DiT().parameters()) == 242_020


def test_patches_come_back_where_they_were() -> None:
    """A change of one patch changes no other one when attention is off."""
    net = awake(channels=2, patch=4)
    for block in net.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # type: ignore[union-attr, arg-type]
    x, t, label = torch.randn(1, 2, 8, 8).double(), torch.rand(1).double(), torch.tensor([0])
    y = x.clone()
    y[:, :, :4, 4:] += 1
    change = (net(x, t, label) != net(y, t, label))[0].all(0)
    assert change[:4, 4:].all()
    assert not change[4:].any()
    assert not change[:4, :4].any()


def test_null_class_is_one_more_label() -> None:
    x, t, null = torch.randn(1, 1, 8, 8), torch.rand(1), torch.tensor([10])
    assert DiT(null_class=True)(x, t, null).shape == x.shape
    with pytest.raises(IndexError):
        DiT()(x, t, null)


def test_bad_input_is_refused() -> None:
    x, t, labels = torch.randn(1, 1, 8, 8), torch.rand(1), torch.tensor([0])
    with pytest.raises(ValueError, match="bfloat16"):
        DiT()(x, t.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"needed is \(batch, 1, 8, 8\)"):
        DiT()(x[..., :4], t, labels)
    with pytest.raises(ValueError, match="patch=3 must divide size=8"):
        DiT(patch=3)


def test_digits_are_in_units_of_their_standard_deviation() -> None:
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert abs(digits.images.mean()) < 1e-5
    assert abs(digits.images.std(correction=0) - 1) < 1e-5
    pixels = digits.images * digits.std + digits.mean
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-4, rtol=0)
    assert pixels.round().unique().tolist() == list(range(17))


def test_features_know_unseen_digits_and_standardise_them() -> None:
    digits = load_digits()
    first, second = train_features(digits), train_features(digits)
    _, unseen = halves(len(digits.labels))
    logits = first.logits(digits.images[unseen])
    assert label_agreement(logits, digits.labels[unseen]) > 0.97
    features = first(digits.images)
    torch.testing.assert_close(features, second(digits.images))
    torch.testing.assert_close(features.std(0), torch.ones(features.shape[1]))
    # Real digits are near real digits, and far from their blurry class means.
    floor = frechet_distance(features[:898], features[898:])
    means = torch.stack([digits.images[digits.labels == c].mean(0) for c in range(10)])
    assert frechet_distance(first(means[digits.labels]), features) > 3 * floor
