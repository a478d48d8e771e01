"""A transform that does not fit one graph raises with fullgraph=True, else it runs as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.func import grad, jacfwd, jvp, vmap

from jvp_attn import flash_attn_with_tangent
from tests.jvp_attn.attention_cases import Attention, Tensors, energy
from tests.jvp_attn.compile_cases import (
    MASKED,
    Compile,
    Derivative,
    assert_equals_eager,
    by_name,
    in_one_graph,
    masked,
)
from tests.jvp_attn.composition_autograd import leaves, unpacked

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def traced_in_parts(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="eager")


def traced_in_one_graph(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="eager", fullgraph=True)


def grad_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    return compiled(grad(lambda *x: energy(f(*x)), (0, 1, 2)))(*x)


def grad_of_jvp_within(f: Attention, x: Tensors, t: Tensors, compiled: Compile) -> Any:
    def of_tangent(*x: Tensor) -> Tensor:
        outputs, output_tangents = jvp(f, x, t)
        return energy(outputs + output_tangents)

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
    outputs, output_tangents = jvp(compiled(f), x, t)
    return outputs, output_tangents, torch.autograd.grad(energy(outputs + output_tangents), x + t)


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
# torch 2.14 is the first that finds the tangents of a compiled function's arguments.
DUAL_ARGUMENT = OUR_REASON if torch.__version__ < (2, 14) else "wrap a dual tensor input"
BREAKS_THE_GRAPH = {
    **dict.fromkeys((grad_within, grad_of_jvp_within, jvp_of_grad_within), OUR_REASON),
    **dict.fromkeys((vmap_within, jacfwd_within), OUR_REASON),
    **dict.fromkeys((jvp_of_compiled, grad_of_compiled, vmap_of_compiled), TORCHS_REASON),
    **dict.fromkeys((dual_numbers_from_outside, dual_numbers_after_plain_ones), DUAL_ARGUMENT),
    gradient_within_a_dual_level: DUAL_ARGUMENT,
}


@pytest.mark.parametrize("derivative", BREAKS_THE_GRAPH, **by_name)
def test_an_unsupported_transform_raises_with_fullgraph(derivative: Derivative) -> None:
    with pytest.raises(Unsupported, match=BREAKS_THE_GRAPH[derivative]):
        derivative(masked, MASKED.primals(), MASKED.tangents(), traced_in_one_graph)


# With torch.func.grad innermost, torch cannot resume after a graph break that operations follow.
NOT_RESUMABLE = (grad_within, jvp_of_grad_within)


@pytest.mark.parametrize(
    "derivative", [d for d in BREAKS_THE_GRAPH if d not in NOT_RESUMABLE], **by_name
)
def test_an_unsupported_transform_breaks_the_graph_and_equals_eager(derivative: Derivative) -> None:
    assert_equals_eager(derivative, masked, MASKED, traced_in_parts)


@torch.compiler.disable
def product_out_of_the_graph(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (q * q,)


def product_in_two_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    (out,) = product_out_of_the_graph(q, k, v)
    return out + 1, k + v.sum()


@pytest.mark.parametrize(
    ("derivative", "f"),
    [
        *((derivative, masked) for derivative in NOT_RESUMABLE),
        *((derivative, product_in_two_parts) for derivative in (*NOT_RESUMABLE, grad_of_compiled)),
    ],
    **by_name,
)
def test_torch_raises_after_a_graph_break_inside_func_grad(
    derivative: Derivative, f: Attention
) -> None:
    with pytest.raises(AssertionError, match="False != True"):
        derivative(f, MASKED.primals(), MASKED.tangents(), traced_in_parts)


def test_torch_raises_for_the_gradient_of_a_compiled_gradient() -> None:
    x = leaves(MASKED.primals())
    gradients = torch.autograd.grad(energy(in_one_graph(masked)(*x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        energy(gradients).backward()


def jvp_of_jvp(x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: jvp(masked, x, t)[1], x, t)


def jvp_of_tangent_by_hand(x: Tensors, t: Tensors) -> Any:
    return jvp(lambda *x: flash_attn_with_tangent(*x, *t), x, t)


@pytest.mark.parametrize("second_tangent", [jvp_of_jvp, jvp_of_tangent_by_hand], **by_name)
def test_a_jvp_of_a_jvp_raises(second_tangent: Callable[..., Any]) -> None:
    x, t = MASKED.primals(), MASKED.tangents()
    with pytest.raises(Unsupported, match=OUR_REASON):
        traced_in_one_graph(second_tangent)(x, t)
    with pytest.raises(RuntimeError, match=r"Nested forward mode AD|jvp of jvp"):
        traced_in_parts(second_tangent)(x, t)
