"""Stage conformance: each instruction of csrc/ gives on the GPU what NumPy and the emulator give.

The tests in tests/gpu compare the emulator with the same expected numbers. Instructions of compute
capability 9.0 come first, in the order of tests/gpu/conformance_sm90.py.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks.first_contact.build import PROBES, ROOT
from benchmarks.first_contact.case import Case, LeftOut, Result
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.target import HOPPER, Target, target_of
from tests.emulator import emulator, emulator_build
from tests.gpu import conformance, conformance_sm90
from tests.gpu.conformance import Array, Probe, run_in_the_emulator, run_on_the_gpu

SOURCES = {"conformance_sm90.cu": conformance_sm90.PROBES, "conformance.cu": conformance.PROBES}


def cases(settings: Settings) -> Iterator[Case]:
    """The probes of both architectures."""
    target = target_of(settings)
    for source, probes in SOURCES.items():
        for probe in probes:
            inputs = {"probe": probe.kernel, "seed": "RANDOM of tests/gpu/conformance.py"}
            yield Case(probe.kernel, partial(check, target, source, probe), inputs)


def check(target: Target, source: str, probe: Probe) -> Result:
    """Run a probe; its output agrees with the expected one."""
    if "sm90" in source and target.capability != HOPPER:
        raise LeftOut("the GPU's compute capability is not 9.0")
    run = run_on_the_gpu if target.is_gpu else run_in_the_emulator
    found = run(_module(source, target.is_gpu), probe)
    try:
        probe.assert_agrees(found)
    except AssertionError:
        raise AssertionError(difference(found, probe.expected)) from None
    return None


def difference(found: Array, expected: Array) -> str:
    """Where an output differs from the expected one, and how."""
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
        size = np.abs(found.astype(float) - expected.astype(float))[wrong]
    places = np.argwhere(wrong)
    lines = [f"{len(places)} of {wrong.size} numbers differ, by {np.nanmax(size, initial=0):.3g}"]
    for place in places[:6]:
        at = tuple(map(int, place))
        lines.append(f"at {at}: {found[at]} instead of {expected[at]}")
    columns = np.unique(places[:, -1])
    lines.append(f"in columns {columns[:40].tolist()}")
    return "; ".join(lines)


@cache
def _module(source: str, on_gpu: bool) -> ModuleType:
    stem = Path(source).stem
    if on_gpu:
        return emulator.import_file(PROBES / f"{stem}_gpu{sysconfig.get_config_var('EXT_SUFFIX')}")
    path = ROOT / "tests" / "gpu" / source
    return emulator.import_file(emulator_build.build_module(f"{stem}_emulator", [path]))
