"""`checkpoint_jvp` raises where it cannot be exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import functional_call, jvp
from torch.utils.checkpoint import CheckpointError

from jvp_attn import checkpoint_jvp
from tests.jvp_attn.attention_cases import assert_close, energy, named
from tests.jvp_attn.checkpoint_cases import ByName, Call, inputs, kept, not_before_2_13

pytestmark = not_before_2_13


def jvp_of(f: Callable[..., Any]) -> Any:
    """Output and tangent of a function of a tensor that has a tangent, and of one that has none."""
    x, tx, other = inputs("x", "tx", "other")
    return jvp(lambda x: f(x, other), (x,), (tx,))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, _: checkpoint_jvp(lambda y: y * x, x.sin()),
        lambda x, other: checkpoint_jvp(lambda y: y * x, other),
        lambda x, _: checkpoint_jvp(lambda: x),
        lambda x, other: checkpoint_jvp(partial(checkpoint_jvp, lambda y: y * x), other),
    ],
)
def test_a_tangent_that_is_not_among_the_arguments_raises(f: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="pass it to checkpoint_jvp as an argument"):
        jvp_of(f)
    x, tx, other = inputs("x", "tx", "other")
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, tx)
        with pytest.raises(ValueError, match="pass it to checkpoint_jvp as an argument"):
            f(dual, other)


def test_the_value_of_such_a_tensor_may_be_used() -> None:
    def derivatives(call: Call) -> Any:
        return jvp_of(lambda x, _: call(lambda y: y * x.detach(), x.sin()))

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


def test_a_parameter_with_a_tangent_raises() -> None:
    network = ByName(checkpoint_jvp, "module")
    weights = {name: x.detach() for name, x in network.named_parameters()}
    (x,) = inputs("x")
    with pytest.raises(ValueError, match="such as a parameter"):
        jvp(lambda weights: functional_call(network, weights, x), (weights,), (weights,))


def test_modifying_an_argument_in_place_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"tensor 0 .* shape \(2, 5, 8\).* a clone"):
        jvp_of(lambda x, _: checkpoint_jvp(lambda y: y.mul_(2), x.sin()))
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        jvp_of(lambda x, other: checkpoint_jvp(lambda y, z: z.add_(y), x, other))
    jvp_of(lambda x, _: checkpoint_jvp(lambda y: y.clone().mul_(2), x.sin()))


class Holder:
    """Hides a tensor from torch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_objects_that_may_hide_tensors_raise() -> None:
    with pytest.raises(TypeError, match="returned an object of type Holder"):
        jvp_of(lambda x, _: checkpoint_jvp(Holder, x).x)
    with pytest.raises(ValueError, match="as an argument"):
        jvp_of(lambda x, _: checkpoint_jvp(lambda holder: holder.x, Holder(x)))


TRANSFORMED = {
    "grad, jvp": lambda f, x: torch.func.grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
    "jvp, grad": lambda f, x: jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (x,)),
    "jvp, jvp": lambda f, x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,)),
    "vmap, jvp": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad": lambda f, x: torch.func.vjp(f, x),
}


@pytest.mark.parametrize("transforms", TRANSFORMED)
def test_other_transforms_raise(transforms: str) -> None:
    (x,) = inputs("x")
    with pytest.raises(NotImplementedError) as raised:
        TRANSFORMED[transforms](partial(checkpoint_jvp, torch.sin), x)
    assert f"(outermost first) {transforms}:" in str(raised.value)


def test_a_jvp_inside_of_the_block_raises_inside_of_a_jvp() -> None:
    def block(x: Tensor) -> Tensor:
        return jvp(partial(checkpoint_jvp, torch.sin), (x,), (x,))[1]

    with pytest.raises(NotImplementedError, match="jvp, jvp"):
        jvp_of(lambda x, _: checkpoint_jvp(block, x))
    (x,) = inputs("x")
    (found,) = torch.autograd.grad(checkpoint_jvp(block, x).sum(), x)
    assert_close({"": found}, {"": x.cos() - x * x.sin()})


def test_a_backward_pass_inside_of_the_dual_level_raises() -> None:
    x, tx = inputs("x", "tx")
    with fwAD.dual_level():
        y = checkpoint_jvp(torch.sin, fwAD.make_dual(x, tx))
        with pytest.raises(NotImplementedError, match="after the level"):
            torch.autograd.grad(y.sum(), x)


def test_torch_before_2_13_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    with pytest.raises(NotImplementedError, match=r"needs torch 2.13 or newer, got 2.12.1"):
        jvp_of(lambda x, _: checkpoint_jvp(torch.sin, x))


def test_a_second_call_that_differs_raises() -> None:
    calls: list[None] = []

    def block(x: Tensor) -> Tensor:
        calls.append(None)
        return x.sin().cos() if len(calls) == 1 else x.sin()

    out, tangent = jvp_of(lambda x, _: checkpoint_jvp(block, x))
    with pytest.raises(CheckpointError):
        energy([out, tangent]).backward()
