"""In each dtype the error is at most twice that of torch's operations, also on hard data.

The error is ‖x − exact‖ / ‖exact‖ against float64; half an eps of the dtype is always allowed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.jvp_attn.attention_cases import (
    Case,
    Named,
    assert_close,
    outputs_and_gradients,
    projection,
    relative_error,
)
from tests.jvp_attn.data_kinds import Kind, in_dtype, over_data
from tests.jvp_attn.packed_cases import PackedCase


def assert_at_most_twice_the_error(ours: Named, torchs: Named, exact: Named) -> None:
    errors = {name: relative_error(ours[name], exact[name]) for name in torchs}
    allowed = {
        name: max(2 * relative_error(x, exact[name]), torch.finfo(x.dtype).eps / 2)
        for name, x in torchs.items()
    }
    assert all(errors[name] <= allowed[name] for name in torchs), (errors, allowed)


over_dtypes = pytest.mark.parametrize(
    ("dtype", "computed_by"),
    [
        *(
            (dtype, backend)
            for backend in ("cpu", "tiled")
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
        *((dtype, "emulated") for dtype in (torch.bfloat16, torch.float16)),
    ],
    indirect=["computed_by"],
    ids=lambda x: x if isinstance(x, str) else str(x)[6:],
)
FULL = Case(1, 96, 160, heads=4, heads_k=2, head_dim=64, head_dim_v=64)
PROBLEMS: dict[str, Case | PackedCase] = {
    "full": FULL,
    "causal": replace(FULL, causal=True),
    "boolean mask": replace(FULL, mask="boolean", mask_dims="hqk"),
    "additive mask": replace(FULL, mask="additive", mask_dims="hqk", with_tangent="qkvm"),
    "packed": PackedCase(
        (33, 16, 47),
        (40, 20, 100),
        beyond=2,
        heads=4,
        heads_k=2,
        head_dim=64,
        head_dim_v=64,
        causal=True,
    ),
}
over_problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


@over_data
@over_dtypes
@over_problems
def test_out_tangent_and_gradients_have_at_most_twice_the_error_of_torch(
    problem: Case | PackedCase, dtype: torch.dtype, kind: Kind
) -> None:
    data = in_dtype(kind(problem.data()), dtype)
    through = projection("out", "out_tangent", dtype=dtype)
    assert_at_most_twice_the_error(
        outputs_and_gradients(problem.ours, data, through=through),
        outputs_and_gradients(problem.torch_math, data, through=through),
        outputs_and_gradients(problem.naive, in_dtype(data, torch.float64), through=through),
    )


@over_data
@over_dtypes
@over_problems
def test_all_outputs_and_gradients_have_at_most_twice_the_error_of_torch(
    problem: Case | PackedCase, dtype: torch.dtype, kind: Kind
) -> None:
    data = in_dtype(kind(problem.data()), dtype)
    through = projection(dtype=dtype)
    ours = outputs_and_gradients(problem.ours, data, through=through)
    # As torch's attention: half precision is computed in float32 and then rounded.
    torchs = outputs_and_gradients(problem.naive, in_dtype(data, torch.float32), through=through)
    assert_at_most_twice_the_error(
        ours,
        {name: x.to(ours[name].dtype) for name, x in torchs.items()},
        outputs_and_gradients(problem.naive, in_dtype(data, torch.float64), through=through),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    case = Case()
    data = in_dtype(case.data(), dtype)
    expected = outputs_and_gradients(case.ours, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = outputs_and_gradients(case.ours, data)
    assert_close(under_autocast, expected, tolerance=0)
