"""The DiT: derivatives, initialisation, tokens and errors."""

import pytest
import torch
from torch import Tensor, nn

from rcm.models.dit import DiT, DiTConfig

LAST_LABEL_WEIGHT = 0.024912172928452492  # drawn from seed 0 before the network had an end


def randomised(**options: int | bool) -> DiT:
    """A DiT with random weights instead of its initial zeros."""
    net = DiT(**options).double()  # type: ignore[arg-type]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, labels and an end below t, in float64."""
    x, t = torch.randn(3, 1, 8, 8).double(), torch.rand(3).double()
    return x, t, torch.tensor([0, 5, 9]), torch.rand(3) * t


def test_derivative_along_x_t_and_end_is_the_difference_quotient() -> None:
    net = randomised()
    x, t, labels, end = example()
    primals, tangents = (x, t, end), tuple(torch.randn_like(p) for p in (x, t, end))

    def f(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return net(x, t, labels, end=end)

    def shifted(h: float) -> Tensor:
        return f(*(p + h * d for p, d in zip(primals, tangents, strict=True)))

    _, derivative = torch.func.jvp(f, primals, tangents)  # type: ignore[misc]
    quotient = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    assert derivative.norm() > 1e-2
    torch.testing.assert_close(derivative, quotient, atol=1e-7, rtol=1e-6)


def test_the_end_matters_only_through_its_distance_and_starts_without_effect() -> None:
    x, t, labels, end = example()
    net = randomised()
    net.time.zero_output()
    f = net(x, t, labels, end=end)
    assert not torch.equal(f, net(x, t, labels, end=end / 2))
    torch.testing.assert_close(f, net(x, t / 2, labels, end=end - t / 2))
    net.end.zero_output()
    assert torch.equal(net(x, t, labels, end=end), net(x, t, labels))


def test_weights_drawn_from_a_seed_do_not_depend_on_the_end() -> None:
    """The label table is drawn last of what a network of one time has."""
    torch.manual_seed(0)
    label: nn.Embedding = DiT().label
    assert label.weight[-1, -1].item() == LAST_LABEL_WEIGHT


def test_output_starts_at_zero_and_every_parameter_gets_a_gradient() -> None:
    x, t, labels, end = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), torch.zeros(2)
    assert not DiT()(x, t, labels, end=end).any()
    net = randomised().float()
    net(x, t, labels, end=end).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_default_has_250_340_parameters() -> None:
    assert sum(p.numel() for p in DiT().parameters()) == 250_340


def test_tokens_are_placed_back_at_their_patches() -> None:
    """Without attention, a change of one patch changes no other patch."""
    net = randomised(channels=2, patch=4)
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


def test_invalid_input_raises() -> None:
    x, t, labels = torch.randn(1, 1, 8, 8), torch.rand(1), torch.tensor([0])
    with pytest.raises(ValueError, match="bfloat16"):
        DiT()(x, t.bfloat16(), labels)
    with pytest.raises(ValueError, match="float16"):
        DiT()(x, t, labels, end=t.half())
    with pytest.raises(ValueError, match=r"end has shape \(\), but t has \(1,\)"):
        DiT()(x, t, labels, end=torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"expected \(batch, 1, 8, 8\)"):
        DiT()(x[..., :4], t, labels)
    with pytest.raises(ValueError, match="patch is 3; it must divide size, which is 8"):
        DiT(patch=3)


@pytest.mark.parametrize("make", [DiT, DiTConfig])
def test_invalid_sizes_raise(make: type) -> None:
    with pytest.raises(ValueError, match="heads is 3; it must divide dim, which is 64"):
        make(heads=3)
    with pytest.raises(ValueError, match="dim is 0"):
        make(dim=0)
    with pytest.raises(ValueError, match="dim is 62; it must be a multiple of 4"):
        make(dim=62)
    with pytest.raises(TypeError, match=r"depth is 1\.5; it must be an integer"):
        make(depth=1.5)
    with pytest.raises(TypeError, match="heads is True"):
        make(heads=True)
