"""Rings of tiles that go round within one work tile: no slot is filled before it has been read.

A ring has at most 12 slots, and a kernel loads at least two tiles for each step of its loop, so
nine steps and a part of one reuse every slot.
"""

from __future__ import annotations

import pytest

from jvp_attn.backends.kernel_table import KernelEntry
from tests.compile_gate.kernel_doc import keys_stay
from tests.kernels.cases import FAMILIES, Case, Family, axes_of
from tests.kernels.kernel_case import kernel_test

STEPS = 9  # of the loop over tiles
HOPPER = [
    (family, kernel)
    for family in FAMILIES
    if family.arch == "sm90"
    for kernel in family.kernels
    if kernel.element == "bf16" and kernel.tile is not None
]


@pytest.mark.parametrize(("family", "kernel"), HOPPER, ids=[kernel.name for _, kernel in HOPPER])
def test_every_slot_is_reused(family: Family, kernel: KernelEntry) -> None:
    assert kernel.tile is not None
    rows, keys = kernel.tile
    case: Case = {
        **{name: values[0] for name, values in axes_of(family).items()},
        "kernel": kernel.name,
        "queries": str(STEPS * rows + 9 if keys_stay(kernel) else 9),
        "keys": str(9 if keys_stay(kernel) else STEPS * keys + 9),
    }
    test = kernel_test(case)
    assert test.faults(test.run()) == []
