"""Each kernel alone on a GPU, on the problems of tests/kernels: masks, packed sequences, …"""

from __future__ import annotations

from importlib import import_module
from itertools import islice

import pytest
import torch

from tests.emulator import emulator
from tests.gpu.kernels_on_device import KernelsOnDevice
from tests.kernels import harness
from tests.kernels.cases import FAMILIES, Family, axes_of, covering
from tests.kernels.kernel_case import kernel_test

over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.mark.cuda
@over_families
def test_kernels_on_a_gpu(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    if family.arch == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU's compute capability is not 9.0")
    kernels = KernelsOnDevice(import_module("jvp_attn._C"), torch.device("cuda"))
    monkeypatch.setattr(harness, "emulator", kernels)
    cases = covering(axes_of(family), strength=1)
    assert {case["kernel"] for case in cases} == {x.name for x in family.kernels}
    faults = {}
    for case in cases:
        test = kernel_test(case)
        if found := test.faults(test.run()):
            faults[str(case)] = found
    assert not faults


@pytest.mark.slow
@over_families
def test_kernels_in_the_emulator(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """On copies in CPU memory, which tests KernelsOnDevice without a GPU."""
    kernels = KernelsOnDevice(emulator.load(), torch.device("cpu"))
    monkeypatch.setattr(harness, "emulator", kernels)
    for case in islice(covering(axes_of(family), strength=1), 3):
        test = kernel_test(case)
        assert test.faults(test.run()) == []
