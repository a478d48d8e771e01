"""Compiled attention equals eager attention or raises; it never loses a derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import grad, jacfwd, jvp, vmap

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    replace_sdpa,
)
from tests.jvp_attn.attention_cases import Attention, Tensors, assert_close, energy, named, randn
from tests.jvp_attn.composition_autograd import leaves, unpacked
from tests.jvp_attn.composition_features import ADDED, FEATURES, Feature

# Makes a compiled function of a function.
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
# Values and derivatives of f at x along t, where f or what calls it is compiled.
Derivative = Callable[[Attention, Tensors, Tensors, Compile], Any]


def eager(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def traced_in_parts(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="eager")


def traced_in_one_graph(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="eager", fullgraph=True)


def in_one_graph(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


def by_inductor(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="inductor", fullgraph=True)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return flash_attn_jvp(q, k, v, attn_mask=ADDED, causal=True, return_lse=True)


# Shapes that fit the mask.
MASKED = next(feature for feature in FEATURES if feature.name == "additive mask")
FIRST, LAST = randn(2, 2, seed="first"), randn(3, 2, seed="last")


def network(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Attention between other operations, in another layout."""
    heads_first = (q @ FIRST).tanh().transpose(1, 2).contiguous()
    out, lse = masked(heads_first.transpose(1, 2), k, v)
    return (out @ LAST).sin(), lse


# ----------------------------------------------------------------------------
# What compiles in one graph


def forward_and_backward(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    x = leaves(x)
    outputs = compiled(f)(*x)
    return outputs, torch.autograd.grad(energy(outputs), x)


def jvp_and_backward(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, moved = compiled(lambda x, t: jvp(f, x, t))(x, t)
    return outputs, moved, torch.autograd.grad(energy(outputs + moved), x + t)


def jvp_and_backward_through_the_tangent(
    f: Attention, x: Tensors, t: Tensors, compiled: Compile
) -> Any:
    x, t = leaves(x), leaves(t)
    _, moved = compiled(lambda x, t: jvp(f, x, t))(x, t)
    return torch.autograd.grad(energy(moved[:1]), x + t)


def jvp_without_grad(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    with torch.no_grad():
        return compiled(lambda x, t: jvp(f, x, t))(leaves(x), t)


def jvp_along_q(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    q, k, v = leaves(x)
    outputs, moved = compiled(lambda q, k, v: jvp(lambda q: f(q, k, v), (q,), t[:1]))(q, k, v)
    return outputs, moved, torch.autograd.grad(energy(outputs + moved), (q, k, v))


def dual_numbers_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    def moved(q: Tensor, tq: Tensor, k: Tensor, v: Tensor) -> Any:
        with fwAD.dual_level():
            return unpacked(f(fwAD.make_dual(q, tq), k, v))

    return compiled(moved)(x[0], t[0], *x[1:])


OF_EVERY_FEATURE = [forward_and_backward, jvp_and_backward]
OF_A_NETWORK = [
    *(forward_and_backward, jvp_and_backward, jvp_and_backward_through_the_tangent),
    *(jvp_without_grad, jvp_along_q, dual_numbers_within),
]
by_name = {"ids": lambda it: getattr(it, "name", None) or it.__name__}


def assert_equals_eager(
    derivative: Derivative, f: Attention, feature: Feature, compiled: Compile
) -> None:
    x, t = feature.primals(), feature.tangents()
    assert_close(named(derivative(f, x, t, compiled)), named(derivative(f, x, t, eager)))


@pytest.mark.parametrize("derivative", OF_EVERY_FEATURE, **by_name)
@pytest.mark.parametrize("feature", FEATURES, **by_name)
def test_a_compiled_feature_equals_eager(feature: Feature, derivative: Derivative) -> None:
    if feature.is_tangent and derivative is jvp_and_backward:
        pytest.skip("there is no jvp of a jvp")
    assert_equals_eager(derivative, feature.ours, feature, in_one_graph)


@pytest.mark.parametrize("derivative", OF_A_NETWORK, **by_name)
def test_a_compiled_network_equals_eager(derivative: Derivative) -> None:
    assert_equals_eager(derivative, network, MASKED, in_one_graph)


@pytest.mark.parametrize("derivative", OF_EVERY_FEATURE, **by_name)
def test_inductor_equals_eager(derivative: Derivative) -> None:
    assert_equals_eager(derivative, network, MASKED, by_inductor)


# ----------------------------------------------------------------------------
# What does not: with fullgraph=True it raises, else it runs as if it were not compiled


def grad_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    return compiled(grad(lambda *x: energy(f(*x)), (0, 1, 2)))(*x)


def grad_of_jvp_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    def of_tangent(*x: Tensor) -> Tensor:
        outputs, moved = jvp(f, x, t)
        return energy(outputs + moved)

    return compiled(grad(of_tangent, (0, 1, 2)))(*x)


def jvp_of_grad_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    gradient = grad(lambda *x: energy(f(*x)), (0, 1, 2))
    return compiled(lambda x: jvp(gradient, x, t))(x)


def vmap_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    return compiled(vmap(f))(*(torch.stack(pair) for pair in zip(x, t, strict=True)))


def jacfwd_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    return compiled(jacfwd(lambda q: f(q, *x[1:])))(x[0])


def jvp_of_compiled(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    x, t = leaves(x), leaves(t)
    outputs, moved = jvp(compiled(f), x, t)
    return outputs, moved, torch.autograd.grad(energy(outputs + moved), x + t)


def grad_of_compiled(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    compiled_f = compiled(f)
    return grad(lambda *x: energy(compiled_f(*x)), (0, 1, 2))(*x)


def vmap_of_compiled(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    return vmap(compiled(f))(*(torch.stack(pair) for pair in zip(x, t, strict=True)))


def dual_numbers_from_outside(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    compiled_f = compiled(f)
    with fwAD.dual_level():
        return unpacked(compiled_f(fwAD.make_dual(x[0], t[0]), *x[1:]))


def dual_numbers_after_plain_ones(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    compiled_f = compiled(f)
    compiled_f(*x)
    with fwAD.dual_level():
        return unpacked(compiled_f(fwAD.make_dual(x[0], t[0]), *x[1:]))


def gradient_within_a_dual_level(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    q, k, v = leaves(x)
    compiled_f = compiled(f)
    with fwAD.dual_level():
        outputs = compiled_f(fwAD.make_dual(q, t[0]), k, v)
        return unpacked(torch.autograd.grad(energy(outputs), (q, k, v)))


OUR_REASON = "attention goes through torch.func.jvp but no other"
TORCHS_REASON = "torch.func|functorch"
LEAVES_THE_GRAPH = {
    **dict.fromkeys((grad_within, grad_of_jvp_within, jvp_of_grad_within), OUR_REASON),
    **dict.fromkeys((vmap_within, jacfwd_within), OUR_REASON),
    **dict.fromkeys((jvp_of_compiled, grad_of_compiled, vmap_of_compiled), TORCHS_REASON),
    **dict.fromkeys((dual_numbers_from_outside, dual_numbers_after_plain_ones), OUR_REASON),
    gradient_within_a_dual_level: OUR_REASON,
}


@pytest.mark.parametrize("derivative", LEAVES_THE_GRAPH, **by_name)
def test_what_does_not_fit_one_graph_says_so(derivative: Derivative) -> None:
    with pytest.raises(Unsupported, match=LEAVES_THE_GRAPH[derivative]):
        derivative(masked, MASKED.primals(), MASKED.tangents(), traced_in_one_graph)


# Where a level of torch.func.grad is innermost, torch cannot take up the graph again, whatever has
# left it.
NOT_TAKEN_UP_AGAIN = (grad_within, jvp_of_grad_within, grad_of_compiled)


@pytest.mark.parametrize(
    "derivative", [d for d in LEAVES_THE_GRAPH if d not in NOT_TAKEN_UP_AGAIN], **by_name
)
def test_what_does_not_fit_one_graph_leaves_it(derivative: Derivative) -> None:
    assert_equals_eager(derivative, masked, MASKED, traced_in_parts)


@torch.compiler.disable
def product_out_of_the_graph(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (q * q,)


def product_in_two_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    (out,) = product_out_of_the_graph(q, k, v)
    return out + 1, k + v.sum()


@pytest.mark.parametrize("f", [masked, product_in_two_parts], **by_name)
@pytest.mark.parametrize("derivative", NOT_TAKEN_UP_AGAIN, **by_name)
def test_torch_raises_within_a_gradient_after_any_break_of_the_graph(
    derivative: Derivative, f: Attention
) -> None:
    with pytest.raises(AssertionError, match="False != True"):
        derivative(f, MASKED.primals(), MASKED.tangents(), traced_in_parts)


def test_torch_refuses_the_gradient_of_a_compiled_gradient() -> None:
    x = leaves(MASKED.primals())
    gradients = torch.autograd.grad(energy(in_one_graph(masked)(*x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        energy(gradients).backward()


def jvp_of_jvp(x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: jvp(masked, x, t)[1], x, t)


def jvp_of_tangent_by_hand(x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: flash_attn_with_tangent(*x, *t), x, t)


@pytest.mark.parametrize("second_tangent", [jvp_of_jvp, jvp_of_tangent_by_hand], **by_name)
def test_a_tangent_of_a_tangent_is_refused(second_tangent: Callable[..., Any]) -> None:
    x, t = MASKED.primals(), MASKED.tangents()
    with pytest.raises(Unsupported, match=OUR_REASON):
        traced_in_one_graph(second_tangent)(x, t)
    with pytest.raises(RuntimeError, match=r"Nested forward mode AD|jvp of jvp"):
        traced_in_parts(second_tangent)(x, t)


# ----------------------------------------------------------------------------
# What is in a graph


class Recorder:
    """Compiles as aot_eager, and keeps the graphs.

    Attributes:
        made: the graphs of forward passes, in the order in which they were made.
        ran: the same, in the order in which they were called.
    """

    def __init__(self) -> None:
        self.made: list[torch.fx.Graph] = []
        self.ran: list[torch.fx.Graph] = []
        self._backend = aot_autograd(
            fw_compiler=self._recorded, bw_compiler=lambda module, _: make_boxed_func(module)
        )

    def _recorded(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.made.append(module.graph)

        def run(*arguments: Any) -> Any:
            self.ran.append(module.graph)
            return module(*arguments)

        return make_boxed_func(run)

    def __call__(self, f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(f, backend=self._backend, fullgraph=True, **options)


def attention_in(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The operators of this package that it calls."""
    return [node for node in graph.nodes if str(node.target).startswith("jvp_attn.")]


def test_primal_and_tangent_are_one_operator_and_absent_tangents_are_absent() -> None:
    recorder = Recorder()
    jvp_along_q(masked, MASKED.primals(), MASKED.tangents(), recorder)
    (graph,) = recorder.made
    (node,) = attention_in(graph)
    assert node.target == torch.ops.jvp_attn.forward_jvp.default
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    assert arguments["tq"] is not None
    assert [arguments[name] for name in ("tk", "tv", "tmask")] == [None, None, None]


def of_length(length: int) -> Tensors:
    q, k, v = MASKED.shapes.values()
    return tuple(
        randn(shape[0], length + extra, *shape[2:], seed=name)
        for name, shape, extra in zip("qkv", (q, k, v), (0, 1, 1), strict=True)
    )


def attention_with_jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
    def masked_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return flash_attn_jvp(q, k, v, attn_mask=k[:1, :, 0, 0], causal=True, return_lse=True)

    return jvp(masked_by_row, (q, k, v), (q.cos(), k.sin(), v.exp()))


def packed_attention_with_jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ends = [torch.tensor([0, 1, x.shape[0]], dtype=torch.int32) for x in (q, k)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return flash_attn_varlen_jvp(q, k, v, *ends, q.shape[0], k.shape[0], return_lse=True)

    return jvp(packed, (q, k, v), (q.cos(), k.sin(), v.exp()))


@pytest.mark.parametrize(
    ("f", "options", "graphs"),
    [(attention_with_jvp, {}, 2), (packed_attention_with_jvp, {"dynamic": True}, 1)],
)
def test_lengths_do_not_need_a_graph_each(
    f: Callable[..., Any], options: dict[str, bool], graphs: int
) -> None:
    recorder = Recorder()
    compiled = recorder(f, **options)
    for length in (5, 6, 9, 17):
        x = leaves(of_length(length))
        outputs, moved = compiled(*x)
        gradients = torch.autograd.grad(energy(outputs + moved), x)

        expected, expected_moved = f(*x)
        expected_gradients = torch.autograd.grad(energy(expected + expected_moved), x)
        assert_close(
            named((outputs, moved, gradients)),
            named((expected, expected_moved, expected_gradients)),
        )
    assert len(recorder.made) == graphs


# ----------------------------------------------------------------------------
# What compiled code depends on


def test_the_choice_of_a_backend_reaches_what_is_compiled() -> None:
    recorder = Recorder()
    compiled = recorder(masked)

    def calls_the_operators() -> bool:
        """Whether a call made now does; the formula of the backend `math` has none."""
        compiled(*MASKED.primals())
        return attention_in(recorder.ran[-1]) != []

    assert calls_the_operators()
    with jvp_attn.backend("math"):
        assert not calls_the_operators()
    assert calls_the_operators()


def test_a_backend_can_be_chosen_within_what_is_compiled() -> None:
    def both(*x: Tensor) -> Tensors:
        with jvp_attn.backend("math"):
            naive = masked(*x)
        return masked(*x) + naive

    recorder = Recorder()
    assert_close(named(recorder(both)(*MASKED.primals())), named(both(*MASKED.primals())))
    assert len(attention_in(recorder.ran[-1])) == 1


def test_replacing_sdpa_reaches_what_is_compiled() -> None:
    recorder = Recorder()
    compiled = recorder(F.scaled_dot_product_attention)
    heads_first = [x.transpose(1, 2) for x in MASKED.primals()]

    def calls_the_operators() -> bool:
        compiled(*heads_first)
        return attention_in(recorder.ran[-1]) != []

    assert not calls_the_operators()
    with replace_sdpa():
        assert calls_the_operators()
    assert not calls_the_operators()
