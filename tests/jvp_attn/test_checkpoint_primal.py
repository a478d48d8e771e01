"""`checkpoint_primal` changes no value, and no gradient but those through the tangent."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.checkpoint import CheckpointError, checkpoint

from jvp_attn import checkpoint_jvp, checkpoint_primal, replace_sdpa
from tests.jvp_attn.attention_cases import Tensors, assert_close, energy, named, randn
from tests.jvp_attn.checkpoint_cases import (
    SHAPE,
    Block,
    ByName,
    Call,
    inputs,
    kept,
    not_before_2_13,
)
from tests.jvp_attn.composition_autograd import leaves
from tests.jvp_attn.operator_calls import OperatorCalls

pytestmark = not_before_2_13


def nested(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint_primal(partial(checkpoint_primal, f), *args, **kwargs)


def around_checkpoint_jvp(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint_primal(partial(checkpoint_jvp, f), *args, **kwargs)


def by_func_jvp(f: Callable[..., Any], x: Tensors, t: Tensors) -> Any:
    return jvp(f, x, t)


def by_dual_numbers(f: Callable[..., Any], x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(*map(fwAD.make_dual, x, t)))


def without_tangents(f: Callable[..., Any], x: Tensors, t: Tensors) -> Any:
    return f(*x), torch.ones(())


WAYS = pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers])


def results(
    f: Callable[..., Any], names: str, along: Call = by_func_jvp, *others: Tensor
) -> dict[str, Tensor]:
    """Output, tangent, and gradients for inputs of these names and for other tensors.

    The loss is that of distillation, which detaches the tangent.
    """
    x = inputs(*names.split())
    t = inputs(*(f"t{name}" for name in names.split()))
    out, tangent = along(f, x, t)
    (out * tangent.detach()).square().sum().backward()
    return named((out, tangent, [y.grad for y in (*x, *others)]))


class Network(nn.Module):
    """Calls one block twice and another one once; `gate` never has a tangent."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.gate = call, nn.Parameter(randn(*SHAPE, seed="gate"))
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """(batch, seqlen, width) each → the same."""
        for block in (self.first, self.second, self.first):
            given = {"modulation": ([scale, self.gate], None), "name": "c"}
            x = self.call(block, x, condition=given)
        return x


def of_network(call: Call, along: Call = by_func_jvp) -> dict[str, Tensor]:
    network = Network(call)
    torch.manual_seed(0)
    return results(network, "x scale", along, *network.parameters())


# ----------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers, without_tangents])
@pytest.mark.parametrize("call", [checkpoint_primal, nested, around_checkpoint_jvp])
def test_values_and_gradients_through_the_output_do_not_change(call: Call, along: Call) -> None:
    """Dropout is active, so the second call draws the masks of the first."""
    found, expected = of_network(call, along), of_network(kept, along)
    assert len(expected) == 2 + 2 + 1 + 2 * 6
    assert_close(found, expected)


@WAYS
def test_the_tangent_is_detached(along: Call) -> None:
    x, tx = inputs("x", "tx")
    out, tangent = along(partial(checkpoint_primal, Block()), (x,), (tx,))
    assert out.requires_grad
    assert not tangent.requires_grad


@WAYS
def test_several_results_are_kept_with_their_structure(along: Call) -> None:
    def block(x: Tensor, other: Tensor) -> Any:
        return {"same": x, "view": (x * other).flatten(1)}, None, other, "name", torch.arange(3)

    def network(call: Call, other: Tensor) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            pair, nothing, constant, name, index = call(block, x.sin(), other)
            assert (nothing, name, index.tolist()) == (None, "name", [0, 1, 2])
            assert fwAD.unpack_dual(constant).tangent is None
            pair["view"] += 1  # results may be modified in place
            return pair["same"] * constant.sin() + pair["view"].view_as(x) ** 2

        return f

    outcomes = []
    for call in (checkpoint_primal, kept):
        (other,) = inputs("other")
        outcomes.append(results(network(call, other), "x", along, other))
    assert_close(*outcomes)


def test_results_that_the_loss_does_not_use_get_no_gradient() -> None:
    def f(call: Call) -> Callable[[Tensor], Tensor]:
        return lambda x: call(lambda x: (x.sin(), x.sqrt()), x.square())[0]

    assert_close(results(f(checkpoint_primal), "x"), results(f(kept), "x"))


@WAYS
def test_tensors_of_an_enclosing_function_may_have_tangents(along: Call) -> None:
    def network(call: Call, other: Tensor) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            s = x.sin()
            with_moving = call(lambda y: (y * s * other).cos(), x.exp())
            without_moving = call(lambda y: y * x, other)
            return with_moving + without_moving + call(lambda: x)

        return f

    outcomes = []
    for call in (checkpoint_primal, kept):
        (other,) = inputs("other")
        outcomes.append(results(network(call, other), "x", along, other))
    assert_close(*outcomes)


def scaled_weights(module: nn.Module, scale: float) -> dict[str, Tensor]:
    named_weights = module.named_parameters()
    return {name: (scale * x).detach().requires_grad_() for name, x in named_weights}


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers, without_tangents])
@pytest.mark.parametrize("way", ["module", "method", "partial", "closure", "argument"])
def test_replaced_parameters_are_replaced_in_the_second_call(way: str, along: Call) -> None:
    outcomes = []
    for call in (checkpoint_primal, kept):
        network = ByName(call, way)
        weights = scaled_weights(network, 2)
        f = partial(functional_call, network, weights)
        outcomes.append(results(f, "x", along, *weights.values()))
    assert_close(*outcomes)


def test_parameters_may_have_tangents() -> None:
    outcomes = []
    for call in (checkpoint_primal, kept):
        network, (x,) = ByName(call, "module"), inputs("x")
        weights = scaled_weights(network, 1)
        out, tangent = jvp(
            lambda weights: functional_call(network, weights, x),  # noqa: B023
            (weights,),
            ({name: x.detach() for name, x in weights.items()},),
        )
        (out * tangent.detach()).sum().backward()
        gradients = [y.grad for y in (x, *weights.values())]
        outcomes.append(named((out, tangent, gradients)))
    assert_close(*outcomes)


@WAYS
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_is_the_same_in_the_second_call(backward_inside: bool, along: Call) -> None:
    """Also inside of the autocast block, where weights cast by the first call are cached."""
    outcomes = []
    for call in (checkpoint_primal, kept):
        block = Block().eval().float()
        x, tx = leaves((randn(*SHAPE, seed="x").float(), randn(*SHAPE, seed="tx").float()))
        with torch.autocast("cpu", torch.bfloat16):
            out, tangent = along(partial(call, block), (x,), (tx,))
            loss = (out * tangent.detach()).square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        gradients = [y.grad for y in (x, *block.parameters())]
        outcomes.append(named((out, tangent, gradients)))
    assert_close(*outcomes, tolerance=0)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers, without_tangents])
def test_the_second_call_has_the_attention_of_the_first(along: Call, backward_inside: bool) -> None:
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return q * k.cos() * v

    def block(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x.sin(), x, x.cos())

    x, tx = inputs("x", "tx")
    with replace_sdpa(attention):
        out, _ = along(partial(checkpoint_primal, block), (x,), (tx,))
        if backward_inside:
            out.sum().backward()
    if not backward_inside:
        out.sum().backward()
    assert len(calls) == 2
    (y,) = inputs("x")
    attention(y.sin(), y, y.cos()).sum().backward()
    assert_close({"": x.grad}, {"": y.grad})


def test_the_second_call_draws_the_same_random_numbers_and_restores_the_state() -> None:
    def draws(preserve_rng_state: bool) -> list[Tensor]:
        seen: list[Tensor] = []

        def block(x: Tensor) -> Tensor:
            seen.append(torch.rand(3))
            return x.sin()

        x, tx = inputs("x", "tx")
        call = partial(checkpoint_primal, block, preserve_rng_state=preserve_rng_state)
        out, _ = jvp(call, (x,), (tx,))
        before = torch.get_rng_state()
        out.sum().backward()
        assert torch.equal(before, torch.get_rng_state()) == preserve_rng_state
        return seen

    first, second = draws(True)
    assert torch.equal(first, second)
    first, second = draws(False)
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------
# Cost


def test_the_tangent_is_computed_once_and_the_primal_again() -> None:
    with OperatorCalls() as calls:
        of_network(checkpoint_primal)
    assert Counter(calls.names) == {"forward_jvp": 3, "forward": 3, "backward": 3}


@WAYS
@pytest.mark.parametrize("call", [checkpoint_primal, nested])
def test_only_inputs_are_saved(call: Call, along: Call) -> None:
    def saved(call: Call) -> int:
        n_bytes = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal n_bytes
            n_bytes += x.nbytes
            return x

        x, scale, tx, tscale = inputs("x", "scale", "tx", "tscale")
        network = Network(call)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            along(network, (x, scale), (tx, tscale))
        return n_bytes // x.nbytes

    n_blocks, n_inputs = 3, 3
    assert saved(call) == n_blocks * n_inputs
    assert saved(kept) > 5 * n_blocks * n_inputs


@WAYS
def test_activations_and_their_tangents_are_freed_before_the_backward_pass(along: Call) -> None:
    alive = []

    def block(x: Tensor) -> Tensor:
        y = x.sin()
        alive.extend([weakref.ref(y), weakref.ref(y.cos())])
        return y.exp()

    x, tx = inputs("x", "tx")
    out, _ = along(partial(checkpoint_primal, block), (x,), (tx,))
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    out.sum().backward()


def test_saved_inputs_can_be_offloaded() -> None:
    with torch.autograd.graph.save_on_cpu():
        found = of_network(checkpoint_primal)
    assert_close(found, of_network(kept))


def test_the_graph_can_be_used_as_often_as_it_is_retained() -> None:
    x, tx = inputs("x", "tx")
    out, _ = jvp(partial(checkpoint_primal, Block().eval()), (x,), (tx,))
    out.sum().backward(retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    out.sum().backward()
    assert_close({"": x.grad}, {"": 2 * first})
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_the_backward_pass_may_run_in_another_thread() -> None:
    x, tx = inputs("x", "tx")
    out, _ = jvp(partial(nested, Block().eval()), (x,), (tx,))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(out.sum().backward).result()
    (y,) = inputs("x")
    Block().eval()(y).sum().backward()
    assert_close({"": x.grad}, {"": y.grad})


def test_hooks_run_in_the_second_call() -> None:
    block, calls = Block(), []
    block.register_forward_pre_hook(lambda *_: calls.append("forward"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    x, tx = inputs("x", "tx")
    out, _ = jvp(partial(checkpoint_primal, block), (x,), (tx,))
    assert calls == ["forward"]
    out.sum().backward()
    assert calls == ["forward", "forward", "backward"]


# ----------------------------------------------------------------------------
# Outside of a jvp


def test_without_tangents_it_is_torchs_checkpoint() -> None:
    def derivatives(call: Call) -> Any:
        block, (x,) = Block(), inputs("x")
        torch.manual_seed(0)
        out = call(block, x)
        return out, torch.autograd.grad(energy([out]), (x, *block.parameters()))

    torchs = partial(checkpoint, use_reentrant=False)
    assert_close(named(derivatives(checkpoint_primal)), named(derivatives(torchs)), tolerance=0)


def test_without_grad_it_calls_the_function_under_every_transform() -> None:
    calls: list[None] = []

    def block(x: Tensor) -> Tensor:
        calls.append(None)
        return x.sin()

    (x,) = inputs("x")
    with torch.no_grad():
        jacobian = torch.func.jacfwd(partial(checkpoint_primal, block))(x)
    assert_close({"": jacobian}, {"": x.cos().flatten().diag().view(*x.shape, *x.shape)})
    assert len(calls) == 1


# ----------------------------------------------------------------------------
# torch.compile


BLOCK = Block().eval()


def compilable(x: Tensor, tx: Tensor) -> Tensors:
    return jvp(lambda x: checkpoint_primal(BLOCK, checkpoint_primal(BLOCK, x)), (x,), (tx,))


def without_jvp(x: Tensor, tx: Tensor) -> Tensors:
    return checkpoint_primal(BLOCK, x), tx


@pytest.mark.parametrize(("f", "fullgraph"), [(compilable, False), (without_jvp, True)])
def test_a_compiled_function_may_contain_checkpoints(
    f: Call, fullgraph: bool, fresh_compiler: None
) -> None:
    def derivatives(f: Call) -> Any:
        x, tx = inputs("x", "tx")
        BLOCK.zero_grad()
        out, tangent = f(x, tx)
        (out * tangent.detach()).sum().backward()
        return out, tangent, [y.grad.clone() for y in (x, *BLOCK.parameters())]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=fullgraph)
    assert_close(named(derivatives(compiled)), named(derivatives(f)))


def test_a_compiled_jvp_with_a_checkpoint_raises_with_fullgraph(fresh_compiler: None) -> None:
    compiled = torch.compile(compilable, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile without\s+fullgraph=True"):
        compiled(*inputs("x", "tx"))


# ----------------------------------------------------------------------------
# What is not supported raises


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
        TRANSFORMED[transforms](partial(checkpoint_primal, torch.sin), x)
    assert "checkpoint_primal works inside of one torch.func.jvp" in str(raised.value)
    assert f"(outermost first) {transforms}:" in str(raised.value)


def jvp_of(f: Callable[..., Any]) -> Any:
    x, tx, other = inputs("x", "tx", "other")
    return jvp(lambda x: f(x, other), (x,), (tx,))


def test_backward_passes_that_do_not_reach_the_parameters_raise() -> None:
    x, tx = inputs("x", "tx")
    out, _ = jvp(partial(checkpoint_primal, Block()), (x,), (tx,))
    with pytest.raises(RuntimeError, match=r"checkpoint_primal .* needs .backward\(\)"):
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"checkpoint_primal .* needs .backward\(\)"):
        out.sum().backward(inputs=[x], retain_graph=True)
    with pytest.raises(NotImplementedError, match="without create_graph=True"):
        out.sum().backward(create_graph=True)


def test_a_backward_pass_inside_of_the_dual_level_raises() -> None:
    x, tx = inputs("x", "tx")
    with fwAD.dual_level():
        y = checkpoint_primal(torch.sin, fwAD.make_dual(x, tx))
        with pytest.raises(NotImplementedError, match=r"call .backward\(\) after it"):
            fwAD.unpack_dual(y).primal.sum().backward()


def test_a_tensor_that_is_no_leaf_must_be_an_argument_if_two_blocks_use_it() -> None:
    x, tx, other = inputs("x", "tx", "other")
    s = other.sin()

    def f(x: Tensor) -> Tensor:
        return checkpoint_primal(lambda y: y * s, checkpoint_primal(lambda y: y * s, x))

    out, _ = jvp(f, (x,), (tx,))
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_modifying_an_argument_in_place_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"checkpoint_primal .* tensor 0 .* a clone"):
        jvp_of(lambda x, _: checkpoint_primal(lambda y: y.mul_(2), x.sin()))
    jvp_of(lambda x, _: checkpoint_primal(lambda y: y.clone().mul_(2), x.sin()))


def test_modifying_a_saved_argument_later_raises() -> None:
    def f(x: Tensor) -> Tensor:
        x = x.sin()
        same, other = checkpoint_primal(lambda y: (y, y.cos()), x)
        same.mul_(2)
        return same + other

    out, _ = jvp_of(lambda x, _: f(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Holder:
    """Hides a tensor from torch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_objects_that_may_hide_tensors_raise() -> None:
    with pytest.raises(TypeError, match="checkpoint_primal returned an object of type Holder"):
        jvp_of(lambda x, _: checkpoint_primal(Holder, x).x)


def test_torch_before_2_13_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    with pytest.raises(NotImplementedError, match=r"checkpoint_primal .* torch 2.13 .* 2.12.1"):
        jvp_of(lambda x, _: checkpoint_primal(torch.sin, x))


def test_a_second_call_that_returns_other_tensors_raises() -> None:
    calls: list[None] = []

    def block(x: Tensor) -> Any:
        calls.append(None)
        return x.sin() if len(calls) == 1 else (x.sin(), x.cos())

    out, _ = jvp_of(lambda x, _: checkpoint_primal(block, x))
    with pytest.raises(CheckpointError, match="returned 2 tensors, the first returned 1"):
        out.sum().backward()
