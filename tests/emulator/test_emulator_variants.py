"""The other builds of the emulator: with AddressSanitizer, and with ucontext fibers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBES = [
    f"tests/emulator/test_emulator_{what}.py" for what in ("instructions", "faults", "sm90_faults")
]

# A launch without named buffers, where only AddressSanitizer detects a read out of bounds.
OUT_OF_BOUNDS = """\
from tests.emulator.probe_kernels import rows, run_row_sums
run_row_sums("global_read_out_of_range", rows(1, 32), checked=False)
"""


def library_file(name: str) -> str:
    command = ["g++", f"-print-file-name={name}.so"]
    return subprocess.check_output(command, text=True).strip()


def run(*arguments: str, variant: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository, with a variant of the emulator."""
    environment = {**os.environ, "EMULATOR_VARIANT": variant}
    if variant == "sanitized":
        # With libstdc++, so that AddressSanitizer intercepts exceptions.
        environment["LD_PRELOAD"] = " ".join(library_file(x) for x in ("libasan", "libstdc++"))
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python itself leaks
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sanitized", "portable"])
def test_the_emulator_passes_its_tests(variant: str) -> None:
    child = run("-m", "pytest", "-q", "-k", "not endless_loop", *PROBES, variant=variant)
    assert child.returncode == 0, child.stdout


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sanitized", "portable"])
def test_kernels_compute_attention(variant: str) -> None:
    child = run("-m", "tests.emulator.smoke_run", variant, variant=variant)
    assert child.returncode == 0, child.stdout


@pytest.mark.slow
def test_address_sanitizer_checks_kernels() -> None:
    child = run("-c", OUT_OF_BOUNDS, variant="sanitized")
    assert child.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in child.stdout
    assert "async_copies.cpp" in child.stdout
