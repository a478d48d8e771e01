"""Each kernel computes what the formulas say, on all kinds of problems, and breaks no CUDA rule.

The error of an output is ‖x − exact‖ / ‖exact‖, where `exact` is computed in float64 from the
rounded data. It may be twice that of the formula in float32; one rounding of the elements is always
allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch

from jvp_attn.backends.kernel_table import KERNELS
from tests.kernels.cases import FAMILIES, Case, Family, axes_of, covering
from tests.kernels.kernel_case import kernel_test

FEW_SEEDS, SEEDS = range(2), range(3)  # each draws an order of blocks and threads
NONDETERMINISTIC = {"backward": "grad_q"}  # the output that a step accumulates atomically
PARTS = 8  # of the cases of a family, one test each
SAMPLE = [case for family in FAMILIES for case in covering(axes_of(family), strength=1)]


def faults_of(case: Case, seeds: Iterable[int]) -> list[str]:
    """What is wrong with the outputs of a case's kernel, for any of the scheduling seeds."""
    test = kernel_test(case)
    first, *others = (test.run(seed) for seed in seeds)
    faults = test.faults(first)
    for other in others:
        for name, x in first.items():
            if name == NONDETERMINISTIC.get(KERNELS[case["kernel"]].step):
                faults += test.faults({name: other[name]})
                continue
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            if not torch.equal(x.view(bits), other[name].view(bits)):
                faults.append(f"{name} depends on the order of threads")
    return faults


@pytest.mark.parametrize(
    "case", SAMPLE, ids=[f"{case['kernel']}-{i}" for i, case in enumerate(SAMPLE)]
)
def test_sample(case: Case) -> None:
    faults = faults_of(case, FEW_SEEDS)
    assert not faults, (case, faults)


@cache
def all_pairs(family: Family) -> list[Case]:
    """Cases with every pair of settings; computed when a test needs them, not at collection."""
    return covering(axes_of(family), strength=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_pairs_of_settings(family: Family, part: int) -> None:
    found = [(case, faults_of(case, SEEDS)) for case in all_pairs(family)[part::PARTS]]
    wrong = [(case, faults) for case, faults in found if faults]
    assert not wrong, f"{len(wrong)} of {len(found)} cases, such as {wrong[:3]}"
