"""Rows whose scores are all huge are as accurate as ordinary rows, in every output of each kernel.

In lse = max + log(sum) the logarithm is lost beside a huge maximum; kernels keep it in lse_lo.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import ELEMENTS, HEAD_DIMS, KERNELS
from tests.kernels.buffers import LAYOUTS, buffer_of
from tests.kernels.dq_accum import ACCUMULATORS, zeros
from tests.kernels.harness import WRITES, Launch, output_buffers, row_buffer_of
from tests.kernels.huge_scores import (
    LEVEL,
    MASKS,
    PRODUCTS,
    SCALE,
    SIGN,
    STEP,
    TILE,
    huge_inputs,
    huge_mask,
    kinds_of_rows,
)
from tests.kernels.problems import DTYPES
from tests.kernels.reference import INPUTS, ROW_VECTORS, Problem, attention
from tests.kernels.test_pipelines import PIPELINES, kernels_of

HugeCase = tuple[str, str, int, str, str]  # pipeline, element, head dim, mask and architecture

ALL_PIPELINES = {**PIPELINES, "forward jvp": ("forward_jvp",), "forward jvp, q": ("forward_jvp_q",)}
CASES = [
    (pipeline, element, head_dim, mask, arch)
    for arch in ("sm80", "sm90")
    for pipeline in ALL_PIPELINES
    for element in ELEMENTS
    for head_dim in HEAD_DIMS
    for mask in (("none", "float32", "element") if arch == "sm80" else ("none",))
    if (kernels := kernels_of(ALL_PIPELINES[pipeline], element, head_dim, mask != "none", arch))
    and KERNELS.keys() >= set(kernels)
    and any(KERNELS[name].arch == arch for name in kernels)
]


def is_exhaustive(pipeline: str, element: str, head_dim: int, mask: str, arch: str) -> bool:
    """By default each pipeline runs once for each kind of mask, with the smallest head dim."""
    first = next(c for c in CASES if (c[0], c[3], c[4]) == (pipeline, mask, arch))
    return (element, head_dim) != first[1:3]


def kernels_of_case(case: HugeCase) -> list[str]:
    pipeline, element, head_dim, mask, arch = case
    return kernels_of(ALL_PIPELINES[pipeline], element, head_dim, mask != "none", arch)


over_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, marks=[pytest.mark.exhaustive] * is_exhaustive(*c), id="-".join(map(str, c))
        )
        for c in CASES
    ],
)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@over_cases
def test_huge_rows_are_as_accurate_as_ordinary_rows(case: HugeCase, packed: bool) -> None:
    kinds = kinds_of_rows(PRODUCTS if case[3] == "none" else MASKS, rows_of(case))
    problem, inputs = problem_of(case, kinds, packed=packed)
    outputs = run(problem, inputs, case)
    exact = attention(problem, inputs, round_scores=True)
    in_float32 = attention(problem, inputs, torch.float32)
    faults = faults_of_lse(outputs.pop("lse"), outputs.pop("lse_lo"), exact["lse"])
    for name, actual in outputs.items():
        for part, x in parts_of(name, kinds, case[2] // 2).items():
            fault = fault_of(actual[x], exact[name][x], in_float32[name].to(actual.dtype)[x])
            faults += [f"{name} of {part} {fault}"] if fault else []
    assert not faults, faults


@over_cases
def test_ordinary_rows_need_no_lse_lo(case: HugeCase) -> None:
    problem, inputs = problem_of(case, ["ordinary"] * rows_of(case), packed=False)
    outputs = run(problem, inputs, case)
    without = run(problem, inputs, case, absent=("lse_lo",))
    assert outputs.keys() - without.keys() == {"lse_lo"}
    for name, x in without.items():
        if not (name == "grad_q" and "atomic" in case[0]):  # accumulated in any order
            assert torch.equal(x, outputs[name]), name


# ----------------------------------------------------------------------------
# Data


def rows_of(case: HugeCase) -> int:
    rows, _ = KERNELS[kernels_of_case(case)[0]].tile or (0, 0)
    return rows + TILE + 9


def problem_of(
    case: HugeCase, kinds: list[str], *, packed: bool
) -> tuple[Problem, dict[str, Tensor]]:
    """A problem with rows of these kinds, and those inputs that the pipeline reads."""
    pipeline, element, head_dim, mask_of, _ = case
    _, keys = KERNELS[kernels_of_case(case)[0]].tile or (0, 0)
    rows, keys, heads, dtype = len(kinds), keys + 25, 2, DTYPES[element]
    starts_q = (0, rows // 2 + 3, rows // 2 + 3, rows) if packed else (0, rows)
    starts_k = (0, keys - 20, keys - 18, keys) if packed else (0, keys)
    mask = None
    if mask_of != "none":
        mask_dtype = torch.float32 if mask_of == "float32" else dtype
        mask = torch.zeros(len(starts_q) - 1, heads, rows, keys, dtype=mask_dtype)
        for own, (start, end) in zip(mask, pairwise(starts_q), strict=True):
            shape = (heads, end - start, keys)
            own[:, : end - start] = huge_mask(kinds[start:end], shape, mask_dtype)
    lengths = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k} if packed else {}
    problem = Problem(SCALE, "bottom_right" if packed else "no", mask, **lengths)

    q, k, row = (1, rows, heads, head_dim), (1, keys, 1, head_dim), (1, heads, rows)
    shapes = dict(zip(INPUTS, (q, k, k, q, k, k, q, q, row, row), strict=True))
    inputs = huge_inputs(problem, shapes, kinds, dtype)
    absent: tuple[str, ...] = ()
    if pipeline.startswith("backward"):
        absent = ("tq", "tk", "tv", "grad_tout", "grad_mu")
    elif pipeline == "forward jvp, q":
        absent = ("tk", "tv")
    return problem, {name: x for name, x in inputs.items() if name not in absent}


def run(
    problem: Problem, inputs: dict[str, Tensor], case: HugeCase, *, absent: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """All outputs of the case's pipeline that `attention` computes, and lse_lo."""
    buffers = {
        name: row_buffer_of(x) if name in ROW_VECTORS else buffer_of(x, LAYOUTS["dense"])
        for name, x in inputs.items()
    }
    shape = tuple(inputs["q"].shape)
    row = (shape[0], shape[2], shape[1])
    steps = ALL_PIPELINES[case[0]]
    written = {name for step in steps for name in WRITES[step].split()} - set(absent)
    shapes = {}
    for name in written - set(ACCUMULATORS):
        of = name.removeprefix("grad_").removesuffix("_lo")
        shapes[name] = row if name in ROW_VECTORS else tuple(inputs.get(of, inputs["q"]).shape)
    dense = dict.fromkeys(shapes, LAYOUTS["dense"])
    outputs = output_buffers(shapes, inputs["q"].dtype, dense)
    sums = zeros(problem, shape)
    outputs |= {name: sums[name] for name in written & set(ACCUMULATORS)}
    Launch(problem, buffers, outputs).run(*kernels_of_case(case))
    ignored = {*ACCUMULATORS, "out_lo", "tout_lo", "beta", "delta"}
    return {name: buffer.view for name, buffer in outputs.items() if name not in ignored}


def parts_of(name: str, kinds: list[str], half: int) -> dict[str, Any]:
    """The parts of an output that are compared: rows of one kind, columns of one magnitude."""
    if name.removeprefix("grad_") in ("v", "tv"):
        return {"all keys": (slice(None),)}
    if name in ("grad_k", "grad_tk"):
        columns = (LEVEL, STEP, SIGN, slice(SIGN + 1, half), slice(half, None))
        return {f"columns {c}": (..., c) for c in columns}
    rows = {
        kind: torch.tensor([i for i, found in enumerate(kinds) if found == kind])
        for kind in dict.fromkeys(kinds)
    }
    by_row = name in ROW_VECTORS
    return {kind: (..., i) if by_row else (slice(None), i) for kind, i in rows.items()}


def fault_of(actual: Tensor, exact: Tensor, rounded: Tensor) -> str:
    """What is wrong with a part of an output; empty if it is right."""
    norm = float(exact.norm())
    error, of_rounded = (float((x.double() - exact).norm()) for x in (actual, rounded))
    # A part has few rows, whose errors do not average out: two roundings may add up.
    rounding = 1e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    allowed = max(2 * of_rounded, rounding * norm)
    return "" if error <= allowed else f"has an error of {error:.2e}, {allowed:.2e} allowed"


def faults_of_lse(lse: Tensor, lse_lo: Tensor, exact: Tensor) -> list[str]:
    """What is wrong with lse and its low-order part."""
    hidden = exact == -torch.inf
    if not (torch.equal(lse == -torch.inf, hidden) and (lse_lo[hidden] == 0).all()):
        return ["rows that see no key"]
    both = lse.double() + lse_lo.double()
    difference = (both - exact).abs()[~hidden & (exact.abs() < 2**30)]
    if difference.max() > 1e-5:
        return [f"lse + lse_lo differs by {difference.max()}"]
    return []
