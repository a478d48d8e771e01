"""The layouts of csrc are those of CuTe, the layout library of NVIDIA's CUTLASS.

The emulator and the kernels could share a misunderstanding of the instructions. CuTe is written by
others: its matrix descriptors, swizzles, fragments and tensor maps are computed on the CPU and
compared with those of csrc number by number, for each tile of the kernel table, and its layouts
perform the products that csrc issues.

CuTe builds whole atoms of 64 columns. Where a wgmma takes a part of the last one (head dim 96, and
the 72 columns of backward), its descriptor is compared with that of whole atoms, and the product
with a plain product; that the tensor cores take a part of an atom is for a GPU to show.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from jvp_attn.backends.kernel_table import KERNELS
from tests.cute.checks import CHECKS, Check, checks_of
from tests.cute.cute_build import Result, compare, why_not


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return compare()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.xdist_group("cute")  # one process compiles
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_csrc_agrees_with_cute(check: Check, results: dict[str, Result]) -> None:
    result = results[check.name]
    assert result.numbers > 0
    assert result.differences == 0, result.first


def test_a_new_tile_is_compared() -> None:
    kernel = replace(KERNELS["forward_bf16_d128_sm90"], tile=(256, 144))
    names = {check.name for check in checks_of([kernel])}
    assert {"sm90-multiply_transposed-256x144x128", "sm90-tensor_maps-144x128"} <= names


def test_an_unknown_step_is_an_error() -> None:
    kernel = replace(KERNELS["forward_bf16_d128_sm90"], step="sideways")
    with pytest.raises(ValueError, match="add the step sideways to tests/cute/checks"):
        checks_of([kernel])
