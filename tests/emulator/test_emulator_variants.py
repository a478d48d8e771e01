"""The other builds of the emulator: under AddressSanitizer, and without a switch in assembly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROBES = [
    str(HERE / f"test_emulator_{what}.py") for what in ("instructions", "faults", "sm90_faults")
]

# A launch with unknown buffers, so that nobody but AddressSanitizer sees the read past their end.
OUT_OF_BOUNDS = """\
from tests.emulator.probe_kernels import rows, run_row_sums
run_row_sums("global_read_out_of_range", rows(1, 32), checked=False)
"""


def library_file(name: str) -> str:
    command = ["g++", f"-print-file-name={name}.so"]
    return subprocess.check_output(command, text=True).strip()


def run(*arguments: str, variant: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the emulator in a variant of its build."""
    path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "EMULATOR_VARIANT": variant}
    if variant == "sanitized":
        # libstdc++ too: otherwise AddressSanitizer does not find what throws exceptions.
        environment["LD_PRELOAD"] = " ".join(library_file(x) for x in ("libasan", "libstdc++"))
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python itself leaks
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sanitized", "portable"])
def test_the_emulator_passes_its_tests(variant: str) -> None:
    child = run("-m", "pytest", "-q", "-k", "not endless_wait", *PROBES, variant=variant)
    assert child.returncode == 0, child.stdout


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sanitized", "portable"])
def test_kernels_run(variant: str) -> None:
    child = run(str(HERE / "few_kernels.py"), variant, variant=variant)
    assert child.returncode == 0, child.stdout


@pytest.mark.slow
def test_address_sanitizer_sees_what_kernels_do() -> None:
    child = run("-c", OUT_OF_BOUNDS, variant="sanitized")
    assert child.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in child.stdout
    assert "copies.cpp" in child.stdout
