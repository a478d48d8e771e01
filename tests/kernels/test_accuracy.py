"""The rule of accuracy, for each kernel where there are rows enough for errors to average out.

For each output the error is at most twice that of the formula in float32, and one rounding of the
elements is always allowed: on plain data, on data whose means cancel, and on large logits.
"""

from __future__ import annotations

import pytest
from cases import FAMILIES, Case, Family, axes_of
from trial import trial

KERNELS_OF_FAMILIES = [(family, kernel.name) for family in FAMILIES for kernel in family.kernels]


@pytest.mark.parametrize("data", ["plain", "offset", "large logits"])
@pytest.mark.parametrize(
    ("family", "kernel"), KERNELS_OF_FAMILIES, ids=[kernel for _, kernel in KERNELS_OF_FAMILIES]
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
