"""Every kernel gives what the formulas say, on problems of every kind, and obeys the machine.

Errors are ‖x − exact‖ / ‖exact‖ for each output, against float64 on the rounded data: at most twice
that of the formula in float32, and one rounding of the elements is always allowed.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from jvp_attn.backends.kernel_table import KERNELS
from tests.kernels.cases import FAMILIES, Case, Family, axes_of, covering
from tests.kernels.trial import Trial, trial

FEW_ORDERS, ORDERS = range(2), range(3)  # in which blocks and threads run
SUMMED_IN_ANY_ORDER = {"backward": "grad_q"}  # by step
SAMPLE = [case for family in FAMILIES for case in covering(axes_of(family), strength=1)]


def faults_of(case: Case, orders: Iterable[int]) -> list[str]:
    """What is wrong with a case's kernel, in any of these orders of its threads."""
    checked: Trial = trial(case)
    first, *others = (checked.run(seed) for seed in orders)
    faults = checked.faults(first)
    for other in others:
        for name, x in first.items():
            if name == SUMMED_IN_ANY_ORDER.get(KERNELS[case["kernel"]].step):
                faults += checked.faults({name: other[name]})
                continue
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            if not torch.equal(x.view(bits), other[name].view(bits)):
                faults.append(f"{name} depends on the order of threads")
    return faults


@pytest.mark.parametrize(
    "case", SAMPLE, ids=[f"{case['kernel']}-{i}" for i, case in enumerate(SAMPLE)]
)
def test_sample(case: Case) -> None:
    faults = faults_of(case, FEW_ORDERS)
    assert not faults, (case, faults)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_pair_of_circumstances(family: Family) -> None:
    found = [(case, faults_of(case, ORDERS)) for case in covering(axes_of(family), strength=2)]
    wrong = [(case, faults) for case, faults in found if faults]
    assert not wrong, f"{len(wrong)} of {len(found)} cases, such as {wrong[:3]}"
