"""seqused_k masks padded keys: the same as a boolean mask, in every derivative."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from jvp_attn.autograd import ops
from jvp_attn.types import AttentionOptions, Inputs
from tests.jvp_attn.attention_cases import (
    Case,
    assert_close,
    energy,
    named,
    outputs_and_gradients,
    projection,
    randn,
    relative_error,
    small_tiles,
    with_tangents,
    without_tangents,
)
from tests.jvp_attn.emulated_backend import emulated_backend

Attention = Callable[..., tuple[Tensor, ...]]

BATCH, SEQLEN_Q, SEQLEN_K = 3, 5, 7
USED = (4, 7, 0)  # some keys, all keys, none

CASES = {
    "plain": Case(BATCH),
    "causal": Case(BATCH, causal=True),
    "more queries than keys, causal": Case(BATCH, seqlen_q=9, causal=True),
    "boolean mask": Case(BATCH, mask="boolean"),
    "additive mask, causal": Case(BATCH, mask="additive", causal=True),
    "a mask with a tangent": Case(BATCH, mask="additive", mask_dims=".h.k", with_tangent="qkvm"),
    "tangent of q": Case(BATCH, with_tangent="q"),
    # The kernels of compute capability 9.0 require multiples of 8.
    "head dims of TMA": Case(BATCH, head_dim=8, head_dim_v=16),
    "head dims of TMA, causal": Case(BATCH, head_dim=8, head_dim_v=16, causal=True),
    "head dims of TMA, tangent of q": Case(BATCH, head_dim=8, head_dim_v=16, with_tangent="q"),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

BACKENDS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "cpu": partial(jvp_attn.backend, "cpu"),
    "tiled": partial(jvp_attn.backend, "tiled"),
    "math": partial(jvp_attn.backend, "math"),
    "sm80": emulated_backend,
    "sm90": partial(emulated_backend, (9, 0)),
}


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and "cpu" not in jvp_attn.available_backends():
        pytest.skip("the CPU extension is not built")
    with BACKENDS[request.param]():
        yield request.param


def used_keys(*numbers: int) -> Tensor:
    return torch.tensor(numbers or USED, dtype=torch.int32)


def padded(case: Case, used: Tensor) -> Attention:
    """(out, lse) of q, k, v, attn_mask, with keys padded by seqused_k."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        return flash_attn_jvp(
            *(q, k, v), attn_mask=mask, causal=case.causal, seqused_k=used, return_lse=True
        )

    return attention


def masked(case: Case, used: Tensor) -> Attention:
    """The same by the naive formula with an equivalent boolean mask."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        key, query = torch.arange(case.seqlen_k), torch.arange(case.seqlen_q)[:, None]
        keys = used.long()[:, None, None, None]
        seen = (key < keys).expand(-1, 1, case.seqlen_q, -1)
        if case.causal:
            seen = seen & (key <= query + keys - case.seqlen_q)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = torch.where(seen, mask, -torch.inf)
        with jvp_attn.backend("math"):
            return flash_attn_jvp(q, k, v, attn_mask=mask, return_lse=True)

    return attention


# ----------------------------------------------------------------------------
# Every derivative is that of a boolean mask


@over_cases
def test_outputs_tangents_and_gradients_are_those_of_a_mask(case: Case, each_backend: str) -> None:
    data, used = case.data(), used_keys()
    assert_close(
        outputs_and_gradients(padded(case, used), data),
        outputs_and_gradients(masked(case, used), data),
    )


@over_cases
def test_gradients_without_tangents_are_those_of_a_mask(case: Case, each_backend: str) -> None:
    primals, used = case.primals(), used_keys()

    def gradients(attention: Attention) -> Any:
        leaves = [
            x.requires_grad_(x.is_floating_point()) for x in map(Tensor.clone, primals.values())
        ]
        out, lse = attention(*leaves)
        loss = energy((out, lse.masked_fill(lse == -torch.inf, 0)))
        return named(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))

    assert_close(gradients(padded(case, used)), gradients(masked(case, used)))


def loss_of(attention: Attention) -> Callable[..., Tensor]:
    def loss(*inputs: Tensor) -> Tensor:
        out, lse = attention(*inputs)
        return energy((out, lse.masked_fill(lse == -torch.inf, 0)))

    return loss


def jvp_of_grad(attention: Attention, x: Any, tx: Any) -> Any:
    return jvp(grad(loss_of(attention), argnums=(0, 1, 2)), x, tx)[1]


def grad_of_jvp(attention: Attention, x: Any, tx: Any) -> Any:
    return grad(lambda *x: jvp(loss_of(attention), x, tx)[1], argnums=(0, 1, 2))(*x)


def grad_of_grad(attention: Attention, x: Any, tx: Any) -> Any:
    def projected_gradient(*x: Tensor) -> Tensor:
        return projection()(named(grad(loss_of(attention), argnums=(0, 1, 2))(*x)))

    return grad(projected_gradient, argnums=(0, 1, 2))(*x)


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize(
    "derivative", [jvp_of_grad, grad_of_jvp, grad_of_grad], ids=lambda f: f.__name__
)
def test_second_derivatives_are_those_of_a_mask(
    derivative: Callable[..., Any], causal: bool, each_backend: str
) -> None:
    case, used = Case(BATCH, head_dim=8, head_dim_v=8, causal=causal), used_keys()
    x, tx = case.point_and_direction()
    assert_close(
        named(derivative(padded(case, used), x, tx)), named(derivative(masked(case, used), x, tx))
    )


@pytest.mark.parametrize("backend", ["cpu", "tiled", "math"])
def test_hessians_are_those_of_a_mask(backend: str) -> None:
    case, used = Case(2, 2, 3, 2, 1, 2, 2), used_keys(2, 3)
    q, k, v = case.primals().values()
    with jvp_attn.backend(backend):
        found = hessian(loss_of(padded(case, used)), argnums=(0, 1, 2))(q, k, v)
        again = jacrev(jacrev(loss_of(padded(case, used)), argnums=(0, 1, 2)), argnums=(0, 1, 2))
        twice = again(q, k, v)
    expected = hessian(loss_of(masked(case, used)), argnums=(0, 1, 2))(q, k, v)
    assert_close(named(found), named(expected))
    assert_close(named(twice), named(expected))


@pytest.mark.parametrize("backend", ["cpu", "tiled", "math"])
def test_explicit_tangents_are_those_of_a_mask(backend: str) -> None:
    case, used = Case(BATCH, causal=True), used_keys()
    x = case.data()
    with jvp_attn.backend(backend):
        out, tout, lse, mu = flash_attn_with_tangent(
            *x.values(), causal=True, seqused_k=used, return_lse=True
        )
    found = {"out": out, "lse": lse, "out_tangent": tout, "mu": mu}
    assert_close(found, with_tangents(masked(case, used), x))


def test_many_small_tiles_give_the_same() -> None:
    case, used = Case(BATCH, causal=True), used_keys(4, 4, 6)
    with jvp_attn.backend("tiled"), small_tiles(scores=12, rows=4):
        found = outputs_and_gradients(padded(case, used), case.data())
    assert_close(found, outputs_and_gradients(masked(case, used), case.data()))


# ----------------------------------------------------------------------------
# Kernel tiles


LONG = {
    "plain": Case(2, 70, 150, heads=2, heads_k=1, head_dim=64, head_dim_v=64, dtype=torch.bfloat16),
    "causal": Case(2, 70, 150, 2, 1, head_dim=64, head_dim_v=64, causal=True, dtype=torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("used", [(1, 150), (64, 65), (129, 0)], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm80", "sm90"])
@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_lengths_within_and_at_the_end_of_a_tile(
    case: Case, capability: tuple[int, int], used: tuple[int, int]
) -> None:
    data, lengths = case.data(), used_keys(*used)
    exact = {name: x.double() for name, x in data.items()}
    expected = outputs_and_gradients(masked(case, lengths), exact)
    with emulated_backend(capability):
        found = outputs_and_gradients(padded(case, lengths), data)
    errors = {name: relative_error(x, expected[name]) for name, x in found.items()}
    assert all(error <= 2 * torch.finfo(torch.bfloat16).eps for error in errors.values()), errors
    for b, n in enumerate(used):
        assert all(not found[name][b, n:].any() for name in ("grad_k", "grad_v"))
        assert all(not found[name][b, n:].any() for name in ("grad_tk", "grad_tv"))


@pytest.mark.parametrize("used", [(1, 40), (33, 0)], ids=str)
def test_gradients_accumulated_atomically(used: tuple[int, int]) -> None:
    case, lengths = (
        Case(2, 20, 40, heads=2, heads_k=1, head_dim=72, head_dim_v=72),
        used_keys(*used),
    )
    primals = {name: x.to(torch.bfloat16) for name, x in case.primals().items()}

    def nondeterministic(*inputs: Tensor) -> Any:
        return flash_attn_jvp(*inputs, seqused_k=lengths, deterministic=False, return_lse=True)

    expected = outputs_and_gradients(
        masked(case, lengths),
        {name: x.double() for name, x in primals.items()},
        evaluate=without_tangents,
    )
    with emulated_backend((9, 0)):
        found = outputs_and_gradients(nondeterministic, primals, evaluate=without_tangents)
    for name, x in found.items():
        assert relative_error(x, expected[name]) <= 2 * torch.finfo(torch.bfloat16).eps, name


# ----------------------------------------------------------------------------
# Padding


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_nan_in_the_padding_has_no_effect(backend: str) -> None:
    case, used = Case(BATCH, causal=True), used_keys()
    data = case.data()
    poisoned = {name: x.clone() for name, x in data.items()}
    for name in ("k", "v", "tk", "tv"):
        for b, n in enumerate(USED):
            poisoned[name][b, n:] = torch.nan
    with jvp_attn.backend(backend):
        found = outputs_and_gradients(padded(case, used), poisoned)
        expected = outputs_and_gradients(padded(case, used), data)
    assert_close(found, expected, tolerance=0)


def test_examples_without_keys_have_no_output_and_no_gradient(each_backend: str) -> None:
    case, used = Case(BATCH), used_keys(0, 3, 0)
    found = outputs_and_gradients(padded(case, used), case.data())
    for b in (0, 2):
        assert (found["lse"][b] == -torch.inf).all()
        for name in found.keys() - {"lse"}:
            assert not found[name][b].any(), name


# ----------------------------------------------------------------------------
# Composition with transforms, the compiler and checkpoints


def test_vmap_over_lengths_and_keys(each_backend: str) -> None:
    case = Case(2)
    q, k, v = (randn(4, *x.shape, seed=n) for n, x in case.primals().items())
    lengths = torch.tensor([[1, 7], [0, 3], [5, 5], [7, 2]], dtype=torch.int32)

    def attention(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Any:
        return padded(case, used)(q, k, v)

    def one_by_one(*x: Tensor) -> Any:
        return tuple(
            map(torch.stack, zip(*(attention(*y) for y in zip(*x, strict=True)), strict=True))
        )

    found = vmap(attention)(q, k, v, lengths)
    assert_close(named(found), named(one_by_one(q, k, v, lengths)))
    found = vmap(attention, (None, 0, 0, 0))(q[0], k, v, lengths)
    assert_close(named(found), named(one_by_one(q[:1].expand_as(q), k, v, lengths)))
    found = vmap(attention, (0, 0, 0, None))(q, k, v, lengths[0])
    assert_close(named(found), named(one_by_one(q, k, v, lengths[:1].expand_as(lengths))))
    found = vmap(attention, (None, None, None, 0))(q[0], k[0], v[0], lengths)
    same = (x[:1].expand_as(x) for x in (q, k, v))
    assert_close(named(found), named(one_by_one(*same, lengths)))


def test_vmap_of_grad_over_lengths(each_backend: str) -> None:
    case = Case(1)
    q, k, v = case.primals().values()
    lengths = torch.tensor([[1], [0], [5]], dtype=torch.int32)

    def gradients(used: Tensor) -> Any:
        return grad(loss_of(padded(case, used)), argnums=(0, 1, 2))(q, k, v)

    expected = [grad(loss_of(masked(case, n)), argnums=(0, 1, 2))(q, k, v) for n in lengths]
    assert_close(
        named(vmap(gradients)(lengths)), named(tuple(map(torch.stack, zip(*expected, strict=True))))
    )


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_compiled_and_eager_agree(backend: str) -> None:
    case = Case(BATCH, causal=True)
    data = case.data()

    def tangents(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, n: Tensor
    ) -> Any:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flash_attn_jvp(q, k, v, causal=True, seqused_k=n)

        return jvp(attention, (q, k, v), (tq, tk, tv))

    compiled = torch.compile(tangents, fullgraph=True, backend="aot_eager")
    with jvp_attn.backend(backend):
        for used in (used_keys(), used_keys(2, 0, 5)):  # the second without recompiling
            results = []
            for function in (tangents, compiled):
                leaves = [x.clone().requires_grad_() for x in data.values()]
                outputs = function(*leaves, used)
                gradients = torch.autograd.grad(energy(outputs), leaves)
                results.append(named((outputs, gradients)))
            assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_checkpointed_gradients_are_the_same(backend: str) -> None:
    case, used = Case(BATCH), used_keys()
    data = case.data()
    attention = padded(case, used)
    with jvp_attn.backend(backend):

        def checkpointed(*inputs: Tensor) -> Any:
            return checkpoint(attention, *inputs, use_reentrant=False)

        primals = case.primals()
        found = gradients_of(checkpointed, primals)
        assert_close(found, gradients_of(attention, primals), tolerance=0)

        def tangents(*inputs: Tensor) -> Any:
            n = len(inputs) // 2
            return jvp(attention, inputs[:n], inputs[n:])

        def checkpointed_tangents(*inputs: Tensor) -> Any:
            return checkpoint(tangents, *inputs, use_reentrant=False)

        found = gradients_of(checkpointed_tangents, data)
        assert_close(found, gradients_of(tangents, data), tolerance=0)


def gradients_of(function: Callable[..., Any], data: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in data.values()]
    results = torch.utils._pytree.tree_leaves(function(*leaves))
    loss = energy(x.masked_fill(x == -torch.inf, 0) for x in results)
    return named(torch.autograd.grad(loss, leaves))


def test_opcheck() -> None:
    q, k, v = Case(BATCH).primals().values()
    inputs = Inputs(*(x.requires_grad_() for x in (q, k, v)), seqused_k=used_keys())
    for name in ("forward", "forward_jvp"):
        tangents = () if name == "forward" else (q.detach(), None, v.detach(), None)
        scalars = ops._scalars(AttentionOptions(0.5, backend="tiled"))
        operator = getattr(torch.ops.jvp_attn, name).default
        torch.library.opcheck(operator, (*inputs, *tangents, *scalars))
