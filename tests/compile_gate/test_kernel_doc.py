"""The table in docs/kernels.md agrees with the compiler's report and the kernel table."""

from __future__ import annotations

import json

import pytest

from jvp_attn.backends.kernel_table import KERNELS
from tests.compile_gate.kernel_doc import (
    HOPPER,
    PAGE,
    REPORT,
    SCHEDULES,
    prediction,
    shared_memory_cycles,
    tensor_core_cycles,
    with_table,
)


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text("utf-8")
    assert with_table(page) == page, "run python -m tests.compile_gate.kernel_doc"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_reports_have_every_kernel(arch: str) -> None:
    report = json.loads(REPORT.with_name(f"kernel-registers-{arch}.json").read_text("utf-8"))
    assert report["arch"] == arch
    expected = [x.name for x in KERNELS.values() if x.arch == "sm80" or arch == "sm_90a"]
    assert list(report["kernels"]) == expected


def test_every_step_has_a_schedule() -> None:
    assert SCHEDULES.keys() == {kernel.step for kernel in HOPPER}


def test_no_prediction_is_above_the_roofline() -> None:
    kernel = KERNELS["forward_jvp_bf16_d128_sm90"]
    assert shared_memory_cycles(kernel) < tensor_core_cycles(kernel)
    assert (prediction(kernel, 97), prediction(kernel, None)) == ("97 %", "not predicted")
    kernel = KERNELS["jvp_backward_dkv_bf16_d64_sm90"]  # 2688 cycles of shared memory for 2304
    assert (prediction(kernel, 97), prediction(kernel, 80)) == ("86 %", "80 %")


def test_shared_scores_are_multiplied_by_whole_panels() -> None:
    kernel = KERNELS["backward_bf16_d96_sm90"]
    # Four products of 96 columns; for dQ each warpgroup has 64 columns, and 8 of row sums.
    assert tensor_core_cycles(kernel) == 64 * 128 * (4 * 96 + 2 * 72) // 2048
    # Each warpgroup owns 64 keys: 12 KiB of keys and of queries twice, and of queries twice; 2
    # tiles of 16 KiB are loaded. dS is 16 KiB, written once and read by both; each reads 18 KiB of
    # keys and ones.
    moved = 2 * (24 + 24) + 2 * 24 + 2 * 16 + (16 + 32) + 36
    assert shared_memory_cycles(kernel) == moved * 1024 // 128


def test_row_sums_are_columns_of_a_product() -> None:
    kernel = KERNELS["backward_dq_bf16_d64_sm90"]
    assert tensor_core_cycles(kernel) == 128 * 128 * (3 * 64 + 8) // 2048
    # Two warpgroups: 16 KiB of rows and twice 16 KiB of keys for two products; twice 16 KiB of keys
    # and 2 KiB of ones for dQ; 2 tiles are loaded; 32 bytes a thread.
    moved = 2 * (16 + 32) + 2 * (16 + 2) + 2 * 16 + 8
    assert shared_memory_cycles(kernel) == moved * 1024 // 128


@pytest.mark.parametrize(
    ("name", "products", "tile", "moved"),
    [
        # Two warpgroups of 64 rows read 16 KiB of Q or tQ each and 20 KiB of keys each, three
        # times; twice 20 KiB of values three times; and 4 tiles of 20 KiB are loaded.
        ("forward_jvp_bf16_d128_sm90", 6, 128 * 80, 3 * (32 + 40) + 3 * 40 + 4 * 20),
        # One warpgroup of 64 keys: 8 KiB of keys and 12 KiB of queries six times; 12 KiB six times;
        # 4 tiles of 12 KiB; and two tiles of scores of 24 KiB, written and read.
        ("jvp_backward_dkv_bf16_d64_sm90", 12, 96 * 64, 6 * 20 + 6 * 12 + 4 * 12 + 4 * 24),
    ],
)
def test_cycles_of_a_tile(name: str, products: int, tile: int, moved: int) -> None:
    kernel = KERNELS[name]
    assert kernel.head_dim is not None
    assert tensor_core_cycles(kernel) == products * tile * kernel.head_dim // 2048
    assert shared_memory_cycles(kernel) == moved * 1024 // 128
