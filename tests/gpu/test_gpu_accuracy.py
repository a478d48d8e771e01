"""Outputs and gradients of half precision against float64, at realistic sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from jvp_attn import flash_attn_jvp
from tests.gpu.machines import Machine, assert_accurate, outputs, outputs_and_gradients
from tests.jvp_attn.attention_cases import Attention, Case, part, relative_error
from tests.jvp_attn.data_kinds import Kind, over_data, plain

over_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
over_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def case_of(
    machine: Machine, seqlen_q: int, seqlen_k: int, head_dim: int, **others: object
) -> Case:
    """One batch, two heads that share their keys, unless arguments say otherwise."""
    lengths = {"seqlen_q": machine.scaled(seqlen_q), "seqlen_k": machine.scaled(seqlen_k)}
    shape = {"batch": 1, "heads": 2, "heads_k": 1, "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(**{**lengths, **shape, **others})


def check_outputs_and_gradients(machine: Machine, case: Case, kind: Kind = plain) -> None:
    data, cotangents = kind(machine.data(case)), machine.cotangents(case)
    assert_accurate(outputs_and_gradients(case.ours, data, cotangents), case, data, cotangents)


@over_dtypes
@over_masks
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@over_data
def test_all_outputs_and_gradients_through_them(
    machine: Machine, kind: Kind, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    case = case_of(machine, 2000, 2300, head_dim, causal=causal, dtype=dtype)
    check_outputs_and_gradients(machine, case, kind)


@over_dtypes
@over_masks
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 200, 256])
def test_out_and_lse_and_gradients_through_them(
    machine: Machine, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    case = case_of(machine, 2000, 2300, head_dim, causal=causal, dtype=dtype, with_tangent="")
    check_outputs_and_gradients(machine, case)


@over_masks
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@over_data
def test_nondeterministic_gradients(
    machine: Machine, kind: Kind, head_dim: int, causal: bool
) -> None:
    moving = case_of(machine, 2000, 2300, head_dim, causal=causal, dtype=torch.bfloat16)
    case, data = replace(moving, with_tangent=""), part(kind(machine.data(moving)), ("q", "k", "v"))
    cotangents = machine.cotangents(case)
    ours = partial(flash_attn_jvp, causal=causal, deterministic=False, return_lse=True)
    assert_accurate(outputs_and_gradients(ours, data, cotangents), case, data, cotangents)


@over_dtypes
@over_masks
@over_data
def test_tangents_of_the_largest_head_dim(
    machine: Machine, kind: Kind, causal: bool, dtype: torch.dtype
) -> None:
    case = case_of(machine, 2000, 2300, 256, causal=causal, dtype=dtype)
    data = kind(machine.data(case))
    assert_accurate(outputs(case.ours, data), case, data, machine.cotangents(case))


@over_masks
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(16384, 16384), (16384, 512), (512, 16384), (8200, 8100), (1024, 1025)],
    ids=lambda length: str(length),
)
def test_long_sequences(
    machine: Machine, seqlen_q: int, seqlen_k: int, head_dim: int, causal: bool
) -> None:
    case = case_of(machine, seqlen_q, seqlen_k, head_dim, causal=causal, dtype=torch.bfloat16)
    check_outputs_and_gradients(machine, case)


@over_masks
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(1, 1), (1, 300), (300, 1), (63, 64), (64, 65), (129, 127), (0, 3), (3, 0)],
    ids=lambda length: str(length),
)
def test_short_sequences(machine: Machine, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    shape = Case(2, seqlen_q, seqlen_k, heads=4, heads_k=2, head_dim=64, head_dim_v=64)
    check_outputs_and_gradients(machine, replace(shape, causal=causal, dtype=torch.bfloat16))


@pytest.mark.parametrize("with_tangent", ["q", "k", "v", "qk", "qv", "kv"])
def test_absent_tangents(machine: Machine, with_tangent: str) -> None:
    case = case_of(machine, 2000, 512, 64, dtype=torch.bfloat16, with_tangent=with_tangent)
    check_outputs_and_gradients(machine, case)


@pytest.mark.parametrize(("heads", "heads_k"), [(8, 8), (8, 2), (8, 1), (6, 2)])
def test_grouped_heads(machine: Machine, heads: int, heads_k: int) -> None:
    case = case_of(
        machine, 1000, 700, 64, heads=heads, heads_k=heads_k, batch=2, dtype=torch.bfloat16
    )
    check_outputs_and_gradients(machine, case)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 128), (128, 64), (33, 95), (8, 1)])
def test_other_head_dim_of_values(machine: Machine, head_dim: int, head_dim_v: int) -> None:
    case = case_of(machine, 1000, 700, head_dim, head_dim_v=head_dim_v, dtype=torch.bfloat16)
    check_outputs_and_gradients(machine, case)


# ----------------------------------------------------------------------------
# The second derivative of a function along a direction

Function = Callable[..., Tensor]
Point = tuple[Tensor, ...]
EVERY = (0, 1, 2)  # q, k and v


def forward_over_reverse(f: Function, point: Point, direction: Point) -> Point:
    return jvp(grad(f, EVERY), point, direction)[1]


def reverse_over_forward(f: Function, point: Point, direction: Point) -> Point:
    return grad(lambda *x: jvp(f, x, direction)[1], EVERY)(*point)


def reverse_over_reverse(f: Function, point: Point, direction: Point) -> Point:
    def along_direction(*x: Tensor) -> Tensor:
        gradients = grad(f, EVERY)(*x)
        return sum(
            ((g * t).sum() for g, t in zip(gradients, direction, strict=True)), x[0].new_zeros(())
        )

    return grad(along_direction, EVERY)(*point)


@over_dtypes
@over_masks
@pytest.mark.parametrize(
    "second_derivative",
    [forward_over_reverse, reverse_over_forward, reverse_over_reverse],
    ids=lambda f: f.__name__,
)
def test_second_derivatives(
    machine: Machine,
    second_derivative: Callable[[Function, Point, Point], Point],
    causal: bool,
    dtype: torch.dtype,
) -> None:
    case = case_of(machine, 1000, 1000, 64, causal=causal, dtype=dtype)
    data, weights = machine.data(case), machine.cotangents(case)["out"]
    point, direction = ([data[t + x] for x in ("q", "k", "v")] for t in ("", "t"))

    def projection(attention: Attention) -> Function:
        return lambda *x: (attention(*x)[0] * weights).sum()

    found = second_derivative(projection(case.ours), tuple(point), tuple(direction))
    exact = forward_over_reverse(
        projection(case.naive),
        tuple(x.double() for x in point),
        tuple(x.double() for x in direction),
    )
    errors = [relative_error(x, y) for x, y in zip(found, exact, strict=True)]
    assert all(error <= torch.finfo(dtype).eps for error in errors), errors
