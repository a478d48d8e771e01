"""The sm90 kernels without products of parts of swizzle atoms pass the compile gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from jvp_attn.backends.kernel_table import KERNELS
from tests.compile_gate.compile_gate import GENERATE, SETUP, compile_one, faults
from tests.kernels.test_whole_swizzle_atoms import KERNELS_OF_WHOLE_ATOMS


@pytest.mark.skipif(SETUP.find_toolkit() is None, reason="nvcc is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS_OF_WHOLE_ATOMS)
def test_no_kernel_breaks_a_limit(name: str, tmp_path: Path) -> None:
    entry = KERNELS[name]
    GENERATE.generate(tmp_path, [entry], partial_swizzle_atoms=False)
    assert faults(entry, compile_one(tmp_path, entry, arch="sm_90a")) == []
