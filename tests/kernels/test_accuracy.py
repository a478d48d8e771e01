"""The rule of accuracy, for each kernel where there are rows enough for errors to average out.

For each output the error is at most twice that of the formula in float32, and one rounding of the
elements is always allowed: on plain data, on data whose means cancel, and on large logits.
"""

from __future__ import annotations

import pytest

from tests.kernels.cases import FAMILIES, Case, Family, axes_of
from tests.kernels.trial import trial

KINDS_OF_DATA = ("plain", "offset", "large logits")


def is_slow(family: Family, kernel: str, data: str) -> bool:
    """The kernels for 9.0 take their time: of a family one, on one kind of data, is enough."""
    one = (family.kernels[0].name, KINDS_OF_DATA[-1])
    return family.arch == "sm90" and (kernel, data) != one


@pytest.mark.parametrize(
    ("family", "kernel", "data"),
    [
        pytest.param(*x, marks=[pytest.mark.slow] * is_slow(*x), id=f"{x[1]}-{x[2]}")
        for x in (
            (family, kernel.name, data)
            for family in FAMILIES
            for kernel in family.kernels
            for data in KINDS_OF_DATA
        )
    ],
)
def test_errors_of_a_kernel(family: Family, kernel: str, data: str) -> None:
    # The first value along each axis is the plainest, and nothing is absent.
    case: Case = {
        **{name: values[0] for name, values in axes_of(family).items()},
        "kernel": kernel,
        "data": data,
        "queries": "several tiles",
        "keys": "several tiles",
        "heads": "4 over 2",
        "mask dims": "bhrc",
    }
    checked = trial(case, strict=True)
    assert checked.faults(checked.run()) == []
