"""The DiT: initialisation, tokens and errors."""

import pytest
import torch

from rcm.models.dit import DiT, DiTConfig
from tests.rcm.models.networks import randomised


def test_output_starts_at_zero_and_every_parameter_gets_a_gradient() -> None:
    x, t, labels, end = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), torch.zeros(2)
    assert not DiT()(x, t, labels, end=end).any()
    net = randomised().float()
    net(x, t, labels, end=end).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_default_has_250_340_parameters() -> None:
    assert sum(p.numel() for p in DiT().parameters()) == 250_340


def test_the_first_label_embeddings_have_the_standard_deviation_asked_for() -> None:
    small, large = DiTConfig(), DiTConfig(label_std=1.0)
    for config, std in ((small, 0.02), (large, 1.0)):
        assert config.build((1, 8, 8), 100).label.weight.std().item() == pytest.approx(
            std, rel=0.05
        )
    assert large.differences(small) == []  # the weights of one are weights of the other
    assert large.differences(DiTConfig(patch=4)) == ["model.patch = 4 there, 2 here"]


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
    with pytest.raises(ValueError, match="patch is 3; it must divide 8, the side of an image"):
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
