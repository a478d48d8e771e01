"""Operators with tangents, as in graphs that torch.export and make_fx recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx

from jvp_attn import flash_attn_jvp
from jvp_attn.autograd import ops
from tests.jvp_attn.attention_cases import Case, Tensors, assert_close, named, projection, randn
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.primitive_calls import PrimitiveCall, call_of

CASES: dict[str, Case | PackedCase] = {
    "plain": Case(),
    "tangent of k": Case(with_tangent="k"),
    "boolean mask": Case(mask="boolean"),
    "additive mask": Case(mask="additive", with_tangent="qkvm"),
    "packed": PackedCase(causal=True),
}

# (out, lse, tout, mu) of the operator `forward` along these tangents.
Duals = Callable[[PrimitiveCall], tuple[Tensor | None, ...]]


def by_func_jvp(call: PrimitiveCall) -> tuple[Tensor | None, ...]:
    primals, tangents = primals_and_tangents(call)

    def forward(primals: dict[str, Tensor]) -> Tensors:
        return ops.forward(call.inputs._replace(**primals), call.options)[:2]

    outputs, output_tangents = jvp(forward, (primals,), (tangents,))
    return *outputs, *output_tangents


def by_dual_numbers(call: PrimitiveCall) -> tuple[Tensor | None, ...]:
    primals, tangents = primals_and_tangents(call)
    with fwAD.dual_level():
        duals = {name: fwAD.make_dual(primals[name], tangents[name]) for name in primals}
        out, lse, *_ = ops.forward(call.inputs._replace(**duals), call.options)
        (out, tout), (lse, mu) = fwAD.unpack_dual(out), fwAD.unpack_dual(lse)
    return out, lse, tout, mu


def by_compiled_jvp(call: PrimitiveCall) -> tuple[Tensor | None, ...]:
    return torch.compile(by_func_jvp, backend="eager", fullgraph=True)(call)


def primals_and_tangents(call: PrimitiveCall) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tangents = {name: t for name, t in call.tangents._asdict().items() if t is not None}
    return {name: getattr(call.inputs, name) for name in tangents}, tangents


def requiring_grad(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


@pytest.mark.parametrize("duals", [by_func_jvp, by_dual_numbers, by_compiled_jvp])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_tangent_of_forward_is_forward_jvp(
    case: Case | PackedCase, duals: Duals, fresh_compiler: None
) -> None:
    call = call_of(case, backend="tiled").mapped(requiring_grad)
    primals, tangents = primals_and_tangents(call)
    names = ("out", "lse", "tout", "mu")

    def with_gradients(results: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        outputs = dict(zip(names, results, strict=True))
        loss = projection(*names)(outputs)
        return named((outputs, torch.autograd.grad(loss, [*primals.values(), *tangents.values()])))

    expected = ops.forward_jvp(call.inputs, call.tangents, call.options)[:4]
    assert_close(with_gradients(duals(call)), with_gradients(expected))


@pytest.mark.parametrize(
    ("mode", "duals"),
    [
        (torch.no_grad, by_func_jvp),
        (torch.no_grad, by_dual_numbers),
        (torch.inference_mode, by_func_jvp),
    ],
)
def test_tangents_do_not_need_grad(mode: Any, duals: Duals) -> None:
    call = call_of(Case(), backend="tiled")
    with mode():
        actual = duals(call)
    expected = ops.forward_jvp(call.inputs, call.tangents, call.options)[:4]
    assert_close(named(actual), named(tuple(expected)))


@pytest.mark.parametrize("name", ["forward_jvp", "backward", "jvp_backward"])
def test_other_operators_raise_for_tangents(name: str) -> None:
    call = call_of(Case(), backend="tiled")

    def operator(q: Tensor) -> Any:
        return getattr(call.changed("inputs", q=q), name)(ops)

    with pytest.raises(NotImplementedError, match=f"jvp_attn.{name} has no forward derivative"):
        jvp(operator, (call.inputs.q,), (call.tangents.q,))


def test_recorded_attention_has_a_tangent_and_a_recorded_derivative_raises() -> None:
    x, tx = randn(2, 5, 4, 3, seed="x"), randn(2, 5, 4, 3, seed="tx")

    def attention(x: Tensor) -> Tensor:
        return flash_attn_jvp(x, x.sin(), x.cos())

    def energy(x: Tensor) -> Tensor:
        return attention(x).pow(3).sum()

    recorded = make_fx(attention)(2 * x)
    assert_close(named(jvp(recorded, (x,), (tx,))), named(jvp(attention, (x,), (tx,))))
    for derivative in (grad(energy), lambda x: jvp(attention, (x,), (tx,))[1]):
        recorded = make_fx(derivative)(x)
        assert_close({"out": recorded(x)}, {"out": derivative(x)})
        with pytest.raises(NotImplementedError, match="has no forward derivative"):
            jvp(recorded, (x,), (tx,))
