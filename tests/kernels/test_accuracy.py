"""The error bound without exceptions, for each kernel, with enough rows for errors to average out.

The error of an output is at most twice that of the formula in float32, or one rounding of the
elements: on plain data, on data whose means cancel, and on large logits.
"""

from __future__ import annotations

import pytest

from tests.kernels.cases import FAMILIES, Case, Family, axes_of
from tests.kernels.kernel_case import kernel_test

KINDS_OF_DATA = ("plain", "offset", "large logits")


def is_exhaustive(family: Family, kernel: str, data: str) -> bool:
    """Of each slow family (sm90), one kernel runs by default, on one kind of data."""
    default = (family.kernels[0].name, KINDS_OF_DATA[-1])
    return family.arch == "sm90" and (kernel, data) != default


@pytest.mark.parametrize(
    ("family", "kernel", "data"),
    [
        pytest.param(*x, marks=[pytest.mark.exhaustive] * is_exhaustive(*x), id=f"{x[1]}-{x[2]}")
        for x in (
            (family, kernel.name, data)
            for family in FAMILIES
            for kernel in family.kernels
            for data in KINDS_OF_DATA
        )
    ],
)
def test_errors_of_a_kernel(family: Family, kernel: str, data: str) -> None:
    # The first value along each axis is the simplest; all inputs are present.
    case: Case = {
        **{name: values[0] for name, values in axes_of(family).items()},
        "kernel": kernel,
        "data": data,
        "queries": "several tiles",
        "keys": "several tiles",
        "heads": "4 over 2",
        "mask dims": "bhrc",
    }
    test = kernel_test(case, strict=True)
    assert test.faults(test.run()) == []
