"""State dicts of networks without optional parts load strictly into networks that have them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcm.models.dit import DiT
from tests.rcm.models.networks import OPTIONS, example, randomised, small_dit

PARTS = ("end.", "null_label", "guidance.", "log_weight.", "velocity_out.")
WITHOUT_EFFECT = {
    name: OPTIONS[name]
    for name in ("learned_weight", "null_class", "guidance_input", "auxiliary_head")
}
WITHOUT_EFFECT["all"] = {name: True for options in WITHOUT_EFFECT.values() for name in options}


def one_time_weights(net: DiT) -> dict[str, Tensor]:
    """The state dict that the network would have without its optional parts."""
    return {name: w for name, w in net.state_dict().items() if not name.startswith(PARTS)}


@pytest.mark.parametrize("options", WITHOUT_EFFECT.values(), ids=list(WITHOUT_EFFECT))
@pytest.mark.parametrize("assign", [False, True])
def test_a_network_of_one_time_loads_and_computes_the_same(
    options: dict[str, Any], assign: bool
) -> None:
    x, t, labels, end = example()
    old, net = randomised(), small_dit(**options)
    weights = one_time_weights(old)
    names = list(weights)
    net.load_state_dict(weights, assign=assign)
    assert list(weights) == names
    assert torch.equal(net(x, t, labels), old(x, t, labels))
    assert torch.equal(net(x, t, labels, end=end), old(x, t, labels))
    # What is not in the state dict stays trainable.
    net(x, t, labels, end=end).square().sum().backward()
    assert net.end.mlp[-1].weight.grad.any()  # type: ignore[union-attr, operator]


def test_loading_keeps_the_absent_parts_as_they_are_and_overwrites_the_others() -> None:
    source, net = randomised(), randomised(null_class=True, learned_weight=True)
    before = copy.deepcopy(net.state_dict())
    net.load_state_dict(one_time_weights(source))
    for name, weight in net.state_dict().items():
        expected = before if name.startswith(PARTS) else source.state_dict()
        assert torch.equal(weight, expected[name]), name
    net.load_state_dict(source.state_dict())
    assert torch.equal(net.end.mlp[0].bias, source.end.mlp[0].bias)  # type: ignore[arg-type]


def test_the_auxiliary_head_starts_as_a_copy_of_the_output_unless_it_is_loaded() -> None:
    x, t, labels, end = example()
    net = small_dit(auxiliary_head=True)
    assert net.heads is not None
    net.load_state_dict(randomised().state_dict())
    assert torch.equal(*net.heads(x, t, labels, end=end))
    trained = randomised(auxiliary_head=True)
    net.load_state_dict(trained.state_dict())
    assert trained.heads is not None
    assert torch.equal(net.heads(x, t, labels)[1], trained.heads(x, t, labels)[1])


def test_it_works_inside_another_module_and_in_a_copy() -> None:
    old = randomised()
    weights = one_time_weights(old)
    wrapped = nn.Sequential(small_dit(auxiliary_head=True))
    wrapped.load_state_dict({f"0.{name}": weight for name, weight in weights.items()})
    original = small_dit(null_class=True)
    student = copy.deepcopy(original)
    assert original.null_label is not None
    nn.init.normal_(original.null_label)
    student.load_state_dict(weights)
    assert student.null_label is not None
    assert not student.null_label.any()


@pytest.mark.parametrize("missing", ["tokens_out.weight", "time.mlp.0.bias", "blocks.0.mlp.0.bias"])
def test_anything_else_that_is_missing_raises(missing: str) -> None:
    weights = one_time_weights(randomised())
    del weights[missing]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        small_dit(auxiliary_head=True).load_state_dict(weights)


@pytest.mark.parametrize("missing", ["end.mlp.0.weight", "log_weight.linear.bias"])
def test_a_part_without_one_of_its_entries_raises(missing: str) -> None:
    weights = randomised(learned_weight=True).state_dict()
    del weights[missing]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        small_dit(learned_weight=True).load_state_dict(weights)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("null_class", "null_label"),
        ("learned_weight", "log_weight"),
        ("guidance_input", "guidance"),
        ("auxiliary_head", "velocity_out"),
    ],
)
def test_a_part_that_the_network_lacks_raises(option: str, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
        small_dit().load_state_dict(small_dit(**{option: True}).state_dict())


def test_another_width_raises() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        small_dit(dim=32).load_state_dict(one_time_weights(randomised()))
