"""Each option of the DiT: what it changes, and that it changes nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.guidance import GuidedCondition
from rcm.models.dit import DiT, DiTConfig
from rcm.models.modulation import pixel_norm
from tests.rcm.models.networks import OPTIONS, example, randomised, small_dit, zero

LAST_WEIGHT = 0.024912172928452492  # of the label table, drawn last in a network of one time


def copied(source: DiT, target: DiT) -> DiT:
    """The target with all weights that the source has."""
    target.load_state_dict(source.state_dict(), strict=False)
    return target


def test_weights_of_a_seed_are_those_of_a_network_without_an_end() -> None:
    torch.manual_seed(0)
    assert DiT().label.weight[-1, -1].item() == LAST_WEIGHT


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_an_option_draws_the_same_plain_weights(options: dict[str, Any]) -> None:
    plain, net = small_dit().state_dict(), small_dit(**options).state_dict()
    assert all(torch.equal(net[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize(
    "option", ["learned_weight", "null_class", "guidance_input", "auxiliary_head"]
)
def test_what_starts_without_effect_leaves_f_unchanged(option: str) -> None:
    x, t, labels, end = example()
    plain = randomised()
    net = copied(plain, small_dit(**OPTIONS[option]))
    assert torch.equal(net(x, t, labels), plain(x, t, labels))
    assert torch.equal(net(x, t, labels, end=end), plain(x, t, labels, end=end))


def test_the_end_matters_only_through_its_distance_and_starts_without_effect() -> None:
    x, t, labels, end = example()
    net = randomised()
    zero(net.time)
    f = net(x, t, labels, end=end)
    assert not torch.allclose(f, net(x, t, labels, end=end / 2))
    torch.testing.assert_close(f, net(x, t / 2, labels, end=end - t / 2))
    zero(net.end)
    assert torch.equal(net(x, t, labels, end=end), net(x, t, labels))
    new = small_dit()
    torch.nn.init.normal_(new.tokens_out.weight)
    assert torch.equal(new(x, t, labels, end=end), new(x, t, labels))


def test_double_norm_normalises_scale_and_shift() -> None:
    """y = norm(h) ⊙ pnorm(1 + scale) + pnorm(shift), with pnorm(a) = a / sqrt(mean(a²) + eps)."""

    def pnorm(a: Tensor) -> Tensor:
        return a / torch.sqrt(a.square().mean(-1, keepdim=True) + 0.01)

    h, shift, scale = (torch.randn(2, n, 16).double() for n in (4, 1, 1))
    normalised = torch.nn.functional.layer_norm(h, (16,))
    plain, double = (small_dit(double_norm=on).norm for on in (False, True))
    torch.testing.assert_close(plain(h, shift, scale), normalised * (1 + scale) + shift)
    expected = normalised * pnorm(1 + scale) + pnorm(shift)
    torch.testing.assert_close(double(h, shift, scale), expected)
    x, t, labels, _ = example()
    net = copied(randomised(), small_dit(double_norm=True))
    assert not torch.allclose(net(x, t, labels), randomised()(x, t, labels))


def test_double_norm_bounds_size_and_slope_but_is_smooth_at_zero() -> None:
    large, direction = 1e4 * torch.randn(2, 16).double(), torch.randn(2, 16).double()
    torch.testing.assert_close(pixel_norm(large).square().mean(-1), torch.ones(2).double())
    _, slope = torch.func.jvp(pixel_norm, (large,), (direction,))  # type: ignore[misc]
    assert slope.norm() < 1e-3 * direction.norm()
    _, slope = torch.func.jvp(pixel_norm, (0 * large,), (direction,))  # type: ignore[misc]
    torch.testing.assert_close(slope, 10 * direction)


def time_derivative(net: DiT) -> Tensor:
    x, t, labels, _ = example()
    return torch.func.jvp(lambda t: net(x, t, labels), (t,), (torch.ones_like(t),))[1]


def test_fourier_features_multiply_the_time_derivative() -> None:
    torch.manual_seed(0)
    positional, fourier = randomised(), randomised(time_embedding="fourier")
    frequencies = fourier.time.features.frequencies
    assert frequencies.abs().max() > 100
    assert positional.time.features.frequencies.max() < 16.1
    assert time_derivative(fourier).norm() > 5 * time_derivative(positional).norm()


def test_fourier_frequencies_are_saved_because_they_are_random() -> None:
    torch.manual_seed(0)
    first, second = (DiT(time_embedding="fourier") for _ in range(2))
    assert not torch.equal(*(net.time.features.frequencies for net in (first, second)))
    second.load_state_dict(first.state_dict())
    assert torch.equal(*(net.time.features.frequencies for net in (first, second)))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*time\.features\.frequencies"):
        DiT().load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*time\.features\.frequencies"):
        first.load_state_dict(DiT().state_dict())


def test_the_learned_weight_starts_at_zero_and_is_trained() -> None:
    assert small_dit().log_weight is None
    _, t, _, _ = example()
    log_weight = small_dit(learned_weight=True).log_weight
    assert log_weight is not None
    assert torch.equal(log_weight(t), torch.zeros(3).double())
    log_weight(t).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in log_weight.parameters())
    with pytest.raises(ValueError, match="bfloat16"):
        log_weight(t.bfloat16())


def test_the_null_class_is_one_more_label_that_starts_at_zero() -> None:
    x, t, labels, _ = example()
    null = torch.full_like(labels, 10)
    net = copied(randomised(), small_dit(null_class=True))
    without_label = net(x, t, null)
    zero(net.label)
    torch.testing.assert_close(net(x, t, labels), without_label)
    assert net.null_label is not None
    net(x, t, null).square().sum().backward()
    assert net.null_label.grad is not None
    assert net.null_label.grad.any()
    for label in (null + 1, null - 11):
        with pytest.raises(IndexError):
            net(x, t, label)
    with pytest.raises(IndexError):
        small_dit()(x, t, null)


def guided(labels: Tensor, scale: float, low: float = 0.0, high: float = 1.5) -> GuidedCondition:
    scales, lows, highs = (torch.full((3,), v).double() for v in (scale, low, high))
    return GuidedCondition(labels, scales, lows, highs)


def test_the_guidance_input_starts_without_effect_and_distinguishes_scale_and_interval() -> None:
    x, t, labels, _ = example()
    new = copied(randomised(), small_dit(guidance_input=True))
    assert torch.equal(new(x, t, guided(labels, 5.0)), new(x, t, labels))
    net = randomised(guidance_input=True)
    conditions = [
        labels,
        guided(labels, 1.0),
        guided(labels, 5.0),
        guided(labels, 5.0, low=0.5),
        guided(labels, 5.0, high=1.0),
        guided(labels, 5.0, low=1.5, high=0.0),
        guided(labels.flip(0), 5.0),
    ]
    outputs = [net(x, t, condition) for condition in conditions]
    for i, f in enumerate(outputs):
        assert not any(torch.allclose(f, other) for other in outputs[:i]), i


def test_the_guidance_enters_as_one_minus_its_inverse() -> None:
    """It is 1 for an infinite scale, and smooth up to there."""
    x, t, labels, _ = example()
    net = randomised(guidance_input=True)
    infinite = net(x, t, guided(labels, float("inf")))
    torch.testing.assert_close(net(x, t, guided(labels, 1e9)), infinite, atol=1e-6, rtol=0)
    assert not torch.allclose(net(x, t, guided(labels, 1e1)), infinite, atol=1e-2)


def test_an_invalid_guidance_raises() -> None:
    x, t, labels, _ = example()
    with pytest.raises(ValueError, match="no guidance input; build it with guidance_input=True"):
        small_dit()(x, t, guided(labels, 5.0))
    net = small_dit(guidance_input=True)
    with pytest.raises(ValueError, match="guidance scale is 0; as an input it must be positive"):
        net(x, t, guided(labels, 0.0))
    with pytest.raises(ValueError, match=r"low has shape \(\), but t has \(3,\)"):
        net(x, t, guided(labels, 5.0)._replace(low=torch.tensor(0.0)))
    with pytest.raises(ValueError, match="float16"):
        net(x, t, guided(labels, 5.0)._replace(high=torch.ones(3).half()))


def test_the_auxiliary_head_shares_the_blocks_and_has_its_own_output() -> None:
    x, t, labels, end = example()
    assert small_dit().heads is None
    net = randomised(auxiliary_head=True)
    assert net.heads is not None
    f, velocity = net.heads(x, t, labels, end=end)
    assert torch.equal(f, net(x, t, labels, end=end))
    assert velocity.shape == x.shape
    assert not torch.allclose(f, velocity)
    assert net.velocity_out is not None
    net.velocity_out.load_state_dict(net.tokens_out.state_dict())
    assert torch.equal(*net.heads(x, t, labels, end=end))
    new = small_dit(auxiliary_head=True)
    assert new.heads is not None
    assert not new.heads(x, t, labels)[1].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_the_config_builds_the_network_with_its_options(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    built = DiTConfig(dim=16, depth=2, heads=2, **options).build((1, 8, 8), 10).double()
    expected = small_dit(**options)
    assert built.state_dict().keys() == expected.state_dict().keys()
    assert built.norm.double_norm == expected.norm.double_norm
    torch.testing.assert_close(built.state_dict(), expected.state_dict())


@pytest.mark.parametrize("make", [DiT, DiTConfig])
def test_an_unknown_time_embedding_raises(make: type) -> None:
    with pytest.raises(ValueError, match="'sine'; it must be one of positional, fourier"):
        make(time_embedding="sine")
