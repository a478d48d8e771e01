"""Stage kernels: each kernel alone against float64, on the problems of tests/kernels.

Kernels for compute capability 9.0 come first, and every family of kernels in turn, so that a stage
that is cut off has seen them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch

from benchmarks.first_contact.case import Case, LeftOut, Result
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.target import HOPPER, Target, target_of
from jvp_attn.backends.kernel_table import KERNELS
from tests.gpu.kernels_on_device import KernelsOnDevice
from tests.kernels import harness
from tests.kernels.cases import FAMILIES, axes_of, covering, family_of
from tests.kernels.cases import Case as Problem
from tests.kernels.kernel_case import KernelTest, kernel_test

# Problems whose data and exact results threads compute in advance.
AHEAD = 24
THREADS = 6


def cases(settings: Settings) -> Iterator[Case]:
    """Every kernel, and every value of every axis of its family at least once."""
    return cases_of(settings, each=1 if settings.rehearse else None)


def cases_of(settings: Settings, each: int | None) -> Iterator[Case]:
    """The first `each` problems of every family; None is all."""
    target = target_of(settings)
    harness.emulator = KernelsOnDevice(target.extension(), target.device)
    chosen = list(problems(each))
    prepared = _Prepared([problem for _, problem in chosen])
    for index, (name, problem) in enumerate(chosen):
        # Their data are seeded with the problem itself (tests/kernels/problems.py).
        run, family = (
            _Check(target, prepared, index, problem),
            family_of(KERNELS[problem["kernel"]]),
        )
        yield Case(name, run, {"problem": dict(problem)}, group=str(family))


def problems(each: int | None) -> Iterator[tuple[str, Problem]]:
    """Names and problems: a round of the families of sm90, another, …, then sm80."""
    for arch in ("sm90", "sm80"):
        families = [covering(axes_of(x), strength=1)[:each] for x in FAMILIES if x.arch == arch]
        for number, problems_of_round in enumerate(zip_longest(*families)):
            for problem in filter(None, problems_of_round):
                yield f"{problem['kernel']} #{number}", problem


class _Prepared:
    """KernelTests, computed in threads a little ahead of their use."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems
        self._pool = ThreadPoolExecutor(THREADS)
        self._futures: dict[int, Future[KernelTest]] = {}
        torch.set_num_threads(2)

    def get(self, index: int) -> KernelTest:
        for i in range(index, min(index + AHEAD, len(self._problems))):
            if i not in self._futures:
                self._futures[i] = self._pool.submit(kernel_test, self._problems[i])
        return self._futures.pop(index).result()


class _Check:
    """Runs a kernel on a problem, and compares its outputs."""

    def __init__(self, target: Target, prepared: _Prepared, index: int, problem: Problem) -> None:
        self._target = target
        self._prepared = prepared
        self._index = index
        self._problem = problem

    def __call__(self) -> Result:
        if self._problem["kernel"].endswith("_sm90") and self._target.capability != HOPPER:
            raise LeftOut("the GPU's compute capability is not 9.0")
        test = self._prepared.get(self._index)
        faults: list[Any] = test.faults(test.run())
        assert not faults, "; ".join(faults)
        return None
