"""Each of these tests runs on a GPU at realistic sizes, and on a CPU at small ones.

On the CPU they run with the backend `tiled`, which tests the tests. Tests marked `cuda` need an
NVIDIA GPU; without one, the summary of pytest says how many were skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import jvp_attn
from tests.gpu.machines import Machine

CPU = Machine(torch.device("cpu"), "tiled", shrink=64)
GPU = Machine(torch.device("cuda"), "cuda", shrink=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = CPU if request.param == "cpu" else GPU
    with jvp_attn.backend(machine.backend):
        yield machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # One after another, since a single test may need most of the memory of a GPU.
    on_a_gpu = pytest.mark.xdist_group("gpu")
    if not torch.cuda.is_available():
        on_a_gpu = pytest.mark.skip(reason="torch finds no NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(on_a_gpu)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("cuda" in report.keywords for report in skipped)
    if count and not torch.cuda.is_available():
        terminalreporter.write_line(f"torch finds no NVIDIA GPU: skipped {count} tests marked cuda")
