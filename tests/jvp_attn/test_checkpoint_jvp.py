"""`checkpoint_jvp` changes no value and no derivative, and keeps only its inputs."""

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
from torch.utils.checkpoint import checkpoint

from jvp_attn import checkpoint_jvp, replace_sdpa
from tests.jvp_attn.attention_cases import Tensors, assert_close, energy, named, randn
from tests.jvp_attn.checkpoint_cases import (
    SHAPE,
    Block,
    ByName,
    Call,
    bound,
    inputs,
    kept,
    nested,
    not_before_2_13,
)
from tests.jvp_attn.composition_autograd import leaves
from tests.jvp_attn.composition_features import FEATURES, Feature
from tests.jvp_attn.operator_calls import OperatorCalls

pytestmark = not_before_2_13


# ----------------------------------------------------------------------------
# Derivatives


class Network(nn.Module):
    """Calls one block twice and another one once; `gate` never has a tangent."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """(batch, seqlen, width) each → the same."""
        for block in (self.first, self.second, self.first):
            x = self.call(block, x, condition={"modulation": ([scale, gate], None), "name": "c"})
        return x


def by_func_jvp(f: Callable[..., Any], x: Tensors, t: Tensors) -> Any:
    return jvp(f, x, t)


def by_dual_numbers(f: Callable[..., Any], x: Tensors, t: Tensors) -> Any:
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(*map(fwAD.make_dual, x, t)))


def through_out_and_tangent(out: Tensor, tangent: Tensor) -> Tensor:
    return energy([out, tangent])


def through_the_tangent(out: Tensor, tangent: Tensor) -> Tensor:
    return energy([tangent])


def through_a_detached_tangent(out: Tensor, tangent: Tensor) -> Tensor:
    return (out * tangent.detach()).square().sum()


def of_network(
    call: Call, along: Call = by_func_jvp, loss: Call = through_out_and_tangent, seed: int = 0
) -> dict[str, Tensor]:
    """Output, tangent, gradients of the loss for parameters, inputs and tangents."""
    network = Network(call)
    x, scale, gate, tx, tscale = inputs("x", "scale", "gate", "tx", "tscale")
    torch.manual_seed(seed)
    out, tangent = along(lambda x, scale: network(x, scale, gate), (x, scale), (tx, tscale))
    loss(out, tangent).backward()
    weights = {name: x.grad for name, x in network.named_parameters()}
    grads = [y.grad for y in (x, scale, gate, tx, tscale)]
    return {**weights, **named((out, tangent, grads))}


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers])
@pytest.mark.parametrize(
    "loss", [through_out_and_tangent, through_the_tangent, through_a_detached_tangent]
)
@pytest.mark.parametrize("call", [checkpoint_jvp, nested, bound])
def test_a_checkpoint_changes_nothing(call: Call, loss: Call, along: Call) -> None:
    assert_close(of_network(call, along, loss), of_network(kept, along, loss))


@pytest.mark.parametrize("feature", [x for x in FEATURES if not x.is_tangent], ids=lambda x: x.name)
def test_every_feature_of_attention_can_be_checkpointed(feature: Feature) -> None:
    def derivatives(call: Call) -> Any:
        x, t = leaves(feature.primals()), leaves(feature.tangents())
        outputs, tangents = jvp(partial(call, feature.ours), x, t)
        return outputs, tangents, torch.autograd.grad(energy(outputs + tangents), x + t)

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


def test_the_second_call_draws_the_same_random_numbers() -> None:
    def draws(preserve_rng_state: bool) -> list[Tensor]:
        seen: list[Tensor] = []

        def block(x: Tensor) -> Tensor:
            seen.append(torch.rand(3))
            return x.sin()

        (x, tx) = inputs("x", "tx")
        call = partial(checkpoint_jvp, block, preserve_rng_state=preserve_rng_state)
        energy(jvp(call, (x,), (tx,))).backward()
        return seen

    first, second = draws(True)
    assert torch.equal(first, second)
    first, second = draws(False)
    assert not torch.equal(first, second)


def test_autocast_is_the_same_in_the_second_call() -> None:
    def derivatives(call: Call) -> Any:
        block = Block().eval().float()
        x, tx = leaves((randn(*SHAPE, seed="x").float(), randn(*SHAPE, seed="tx").float()))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = jvp(partial(call, block), (x,), (tx,))
        return outputs, torch.autograd.grad(energy(outputs), (x, tx, *block.parameters()))

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)), tolerance=0)


def test_a_second_derivative_in_reverse_mode() -> None:
    def derivatives(call: Call) -> Any:
        x, tx = inputs("x", "tx")
        (weight,) = leaves((randn(SHAPE[-1], SHAPE[-1], seed="weight"),))
        wanted = (x, tx, weight)

        def block(x: Tensor) -> Tensor:
            return (x @ weight).sin()

        loss = energy(jvp(partial(call, block), (x,), (tx,)))
        gradients = torch.autograd.grad(loss, wanted, create_graph=True)
        return gradients, torch.autograd.grad(energy(gradients), wanted)

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


def test_the_graph_can_be_used_as_often_as_it_is_retained() -> None:
    x, tx = inputs("x", "tx")
    loss = energy(jvp(partial(checkpoint_jvp, Block().eval()), (x,), (tx,)))
    first = torch.autograd.grad(loss, (x, tx), retain_graph=True)
    assert_close(named(torch.autograd.grad(loss, (x, tx))), named(first), tolerance=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, tx))


# ----------------------------------------------------------------------------
# Cost


def test_attention_and_its_tangent_are_computed_again_once() -> None:
    with OperatorCalls() as calls:
        of_network(checkpoint_jvp)
    assert Counter(calls.names) == {"forward_jvp": 2 * 3, "jvp_backward": 3}


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers])
@pytest.mark.parametrize("call", [checkpoint_jvp, nested, bound])
def test_only_inputs_and_their_tangents_are_saved(call: Call, along: Call) -> None:
    def saved(call: Call) -> int:
        n_bytes = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal n_bytes
            n_bytes += x.nbytes
            return x

        x, scale, gate, tx, tscale = inputs("x", "scale", "gate", "tx", "tscale")
        network = Network(call)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            along(lambda x, scale: network(x, scale, gate), (x, scale), (tx, tscale))
        return n_bytes // x.nbytes

    n_blocks, n_inputs = 3, 5
    assert saved(call) == n_blocks * n_inputs
    assert saved(kept) > 5 * n_blocks * n_inputs


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers])
@pytest.mark.parametrize("call", [checkpoint_jvp, nested])
def test_saved_inputs_can_be_offloaded(call: Call, along: Call) -> None:
    with torch.autograd.graph.save_on_cpu():
        found = of_network(call, along)
    assert_close(found, of_network(kept, along))


def test_the_backward_pass_may_run_in_another_thread() -> None:
    x, tx = inputs("x", "tx")
    loss = energy(jvp(partial(nested, Block().eval()), (x,), (tx,)))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, loss, (x, tx), retain_graph=True).result()
    assert_close(named(found), named(torch.autograd.grad(loss, (x, tx))), tolerance=0)


def test_inputs_of_an_inner_checkpoint_are_not_kept() -> None:
    inner_inputs = []

    def block(x: Tensor) -> Tensor:
        x = x.sin()
        inner_inputs.append(weakref.ref(x))
        return checkpoint_jvp(torch.cos, x)

    x, tx = inputs("x", "tx")
    outputs = jvp(partial(checkpoint_jvp, block), (x,), (tx,))
    gc.collect()
    assert [ref() for ref in inner_inputs] == [None]
    found = torch.autograd.grad(energy(outputs), (x, tx))
    expected = torch.autograd.grad(energy(jvp(lambda x: x.sin().cos(), (x,), (tx,))), (x, tx))
    assert_close(named(found), named(expected))


# ----------------------------------------------------------------------------
# Arguments, results and the function's other tensors


def test_structures_of_arguments_and_results_are_kept() -> None:
    seen = []

    def block(pair: tuple[Tensor, Any], *, options: dict[str, Any]) -> Any:
        x, nothing = pair
        seen.append((nothing, options["name"], options["index"].dtype))
        moving = [x.sin() * options["scale"], {"square": x**2}]
        return moving, (x.detach(), options["index"] + 1, None, "name", 3, options["scale"] * 2)

    def derivatives(call: Call) -> Any:
        def f(x: Tensor) -> Any:
            options = {"scale": scale, "name": "n", "index": torch.arange(3)}
            result = call(block, (x, None), options=options)
            (first, second), (constant, index, *others, last) = result
            has_tangent = [
                fwAD.unpack_dual(y).tangent is not None
                for y in (first, second["square"], constant, last)
            ]
            results.append((has_tangent, index.tolist(), others))
            return first * second["square"] + constant + last

        x, tx, scale = inputs("x", "tx", "scale")
        outputs = jvp(f, (x,), (tx,))
        return outputs, torch.autograd.grad(energy(outputs), (x, tx, scale))

    results: list[Any] = []
    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))
    assert results[0] == results[1]
    assert results[0] == ([True, True, False, False], [1, 2, 3], [None, "name", 3])
    assert seen == 3 * [(None, "n", torch.int64)]


def test_tensors_of_an_enclosing_function_get_gradients() -> None:
    def derivatives(call: Call) -> Any:
        x, tx, other = inputs("x", "tx", "other")
        outputs = jvp(lambda x: call(lambda x: (x * other).sin(), x), (x,), (tx,))
        return outputs, torch.autograd.grad(energy(outputs), (x, tx, other))

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


@pytest.mark.parametrize("along", [by_func_jvp, by_dual_numbers, lambda f, x, t: (f(*x), x[0])])
@pytest.mark.parametrize("way", ["module", "method", "partial", "closure", "argument"])
def test_replaced_parameters_are_replaced_in_the_second_call(way: str, along: Call) -> None:
    def derivatives(call: Call) -> Any:
        network = ByName(call, way)
        weights = {
            name: (2 * x).detach().requires_grad_() for name, x in network.named_parameters()
        }
        x, tx = inputs("x", "tx")
        outputs = along(lambda x: functional_call(network, weights, x), (x,), (tx,))
        return outputs, torch.autograd.grad(energy(outputs), (x, *weights.values()))

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


def test_hooks_run_in_the_second_call() -> None:
    block, calls = Block(), []
    block.register_forward_pre_hook(lambda *_: calls.append("forward"))
    block.register_full_backward_hook(lambda *_: None)
    x, tx = inputs("x", "tx")
    outputs = jvp(partial(checkpoint_jvp, block), (x,), (tx,))
    assert len(calls) == 1
    energy(outputs).backward()
    assert len(calls) == 2


# ----------------------------------------------------------------------------
# Outside of a jvp


def test_without_tangents_it_is_torchs_checkpoint() -> None:
    def derivatives(call: Call) -> Any:
        block = Block()
        (x,) = inputs("x")
        torch.manual_seed(0)
        out = call(block, x)
        return out, torch.autograd.grad(energy([out]), (x, *block.parameters()))

    torchs = partial(checkpoint, use_reentrant=False)
    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(torchs)), tolerance=0)
    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)), tolerance=0)


def test_without_grad_it_calls_the_function_under_every_transform() -> None:
    calls: list[None] = []

    def block(x: Tensor) -> Tensor:
        calls.append(None)
        return x.sin()

    (x,) = inputs("x")
    with torch.no_grad():
        jacobian = torch.func.jacfwd(partial(checkpoint_jvp, block))(x)
    assert_close({"": jacobian}, {"": x.cos().flatten().diag().view(*x.shape, *x.shape)})
    assert len(calls) == 1


# ----------------------------------------------------------------------------
# replace_sdpa and torch.compile


@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_second_call_has_the_attention_of_the_first(backward_inside: bool) -> None:
    def block(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x.sin(), x, x.cos(), is_causal=True)

    def derivatives(call: Call) -> Any:
        x, tx = inputs("x", "tx")
        with replace_sdpa():
            outputs = jvp(lambda x: call(block, call(block, x)), (x,), (tx,))
            if backward_inside:
                return outputs, torch.autograd.grad(energy(outputs), (x, tx))
        return outputs, torch.autograd.grad(energy(outputs), (x, tx))

    assert_close(named(derivatives(checkpoint_jvp)), named(derivatives(kept)))


BLOCK = Block().eval()


def compilable(x: Tensor, tx: Tensor) -> Tensors:
    return jvp(lambda x: checkpoint_jvp(BLOCK, checkpoint_jvp(BLOCK, x)), (x,), (tx,))


def without_jvp(x: Tensor, tx: Tensor) -> Tensors:
    return checkpoint_jvp(BLOCK, x), tx


@pytest.mark.parametrize(("f", "fullgraph"), [(compilable, False), (without_jvp, True)])
def test_a_compiled_function_may_contain_checkpoints(
    f: Call, fullgraph: bool, fresh_compiler: None
) -> None:
    def derivatives(f: Call) -> Any:
        x, tx = inputs("x", "tx")
        outputs = f(x, tx)
        return outputs, torch.autograd.grad(energy(outputs), (x, tx, *BLOCK.parameters()))

    compiled = torch.compile(f, backend="aot_eager", fullgraph=fullgraph)
    assert_close(named(derivatives(compiled)), named(derivatives(f)))


def test_a_compiled_jvp_with_a_checkpoint_raises_with_fullgraph(fresh_compiler: None) -> None:
    compiled = torch.compile(compilable, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile without\s+fullgraph=True"):
        compiled(*inputs("x", "tx"))


def test_compiled_blocks_can_be_checkpointed(fresh_compiler: None) -> None:
    def derivatives(block: Call, call: Call) -> Any:
        x, tx = inputs("x", "tx")
        outputs = jvp(partial(call, block), (x,), (tx,))
        return outputs, torch.autograd.grad(energy(outputs), (x, tx, *BLOCK.parameters()))

    compiled = torch.compile(BLOCK, backend="aot_eager")
    assert_close(named(derivatives(compiled, checkpoint_jvp)), named(derivatives(BLOCK, kept)))
