"""Every kernel by itself, on the problems of tests/kernels: masks, packed sequences, any layout."""

from __future__ import annotations

from importlib import import_module
from itertools import islice

import emulator
import harness
import pytest
import torch
from cases import STEPS, axes_of, covering, kernels_of
from kernels_on_device import KernelsOnDevice
from trial import trial

over_steps = pytest.mark.parametrize(
    ("step", "masked"), STEPS, ids=lambda x: x if isinstance(x, str) else ("full", "masked")[x]
)


@pytest.mark.cuda
@over_steps
def test_kernels_on_a_gpu(step: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KernelsOnDevice(import_module("jvp_attn._C"), torch.device("cuda"))
    monkeypatch.setattr(harness, "emulator", kernels)
    cases = covering(axes_of(step, masked), strength=1)
    assert {case["kernel"] for case in cases} == {x.name for x in kernels_of(step, masked)}
    faults = {}
    for case in cases:
        attempt = trial(case)
        if found := attempt.faults(attempt.run()):
            faults[str(case)] = found
    assert not faults


@pytest.mark.slow
@over_steps
def test_the_same_by_the_emulator(step: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On copies of memory too, but on this machine: it shows that the copies are right."""
    kernels = KernelsOnDevice(emulator.load(), torch.device("cpu"))
    monkeypatch.setattr(harness, "emulator", kernels)
    for case in islice(covering(axes_of(step, masked), strength=1), 3):
        attempt = trial(case)
        assert attempt.faults(attempt.run()) == []
