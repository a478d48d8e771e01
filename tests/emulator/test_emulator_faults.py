"""The emulator reports what is wrong in a faulty kernel, and where; a correct kernel passes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.probe_kernels import load, rows, run_row_sums, sums

HERE = r"\(tests/emulator/probes/row_sums\.h:\d+\)"
ANY_ADDRESS = r"shared_memory\(\) \+ \d+"
UNORDERED = rf"{ANY_ADDRESS}, which thread \d+'s \w+ {HERE} (wrote|read) with no barrier between"
STILL_COPYING = (
    rf"touches what thread (?P<owner>\d+)'s copy_async {HERE} is still copying: "
    r"thread (?P=owner) has not waited for it"
)
OUTSIDE = "bytes of global memory outside of every buffer: the nearest"

# By fault, the instruction that fails and what the report says of it.
REPORTS = {
    "missing_barrier": ("shared_(load|store)_float", rf"(reads|writes) {UNORDERED}"),
    "missing_barrier_after_wait": ("(load_matrices|copy_async)", rf"(reads|writes) {UNORDERED}"),
    "overwritten_too_early": ("copy_async", rf"writes {UNORDERED}"),
    "missing_wait": ("load_matrices", STILL_COPYING),
    "missing_commit": ("load_matrices", STILL_COPYING),
    "unfinished_copies": ("copy_async", "the thread ends while 4 of its copies are in flight"),
    "shared_index_out_of_range": (
        "shared_store_float",
        r"4 bytes at shared_memory\(\) \+ 4224 are outside of the block's 4224 bytes",
    ),
    "global_read_out_of_range": (
        "copy_async",
        rf"reads 16 {OUTSIDE}, q, has 16384 bytes, and the access reaches \d+ bytes past the end",
    ),
    "global_write_out_of_range": ("global_store", rf"writes 4 {OUTSIDE}, result, has 512 bytes"),
    "write_to_an_input": (
        "global_store",
        "writes 4 bytes of global memory in q, which is read-only",
    ),
    "two_writers": (
        "global_store",
        r"writes byte \d+ of result, which thread \d+ of block \d has written in this launch",
    ),
    "misaligned_copy": ("copy_async", "the global address is 2 bytes past a multiple of 16"),
    "misaligned_matrix_row": ("load_matrices", rf"{ANY_ADDRESS} is not aligned to 16 bytes"),
    "misaligned_store": ("global_store", "the global address is 2 bytes past a multiple of 4"),
    "divergent_shuffle": (
        "shuffle_xor",
        r"must be executed by all threads of the warp, but threads? [\d, -]+ came to "
        rf"shuffle_xor {HERE}",
    ),
    "divergent_instructions": (
        "(shuffle_xor|warp_any)",
        rf"must be executed by all threads of the warp, but threads? [\d, -]+ came to "
        rf"(shuffle_xor|warp_any) {HERE}",
    ),
    "divergent_barrier": (
        "block_barrier",
        r"must be executed by all threads of the block, but threads (0-31|32-63) came to "
        rf"block_barrier {HERE}",
    ),
    "endless_loop": ("shared_load_float", r"the block has taken \d+ steps and has not ended"),
}
DEADLOCKS = {
    "lane_exits_early": rf"waiting at load_matrices {HERE}: threads 0-4, 6-31; ended: thread 5; "
    rf"waiting at block_barrier {HERE}: threads 32-63",
    "warp_exits_early": rf"waiting at block_barrier {HERE}: threads 0-31; ended: threads 32-63",
}
# These break no rule of CUDA; their results are wrong.
WRONG_RESULTS = ("other_swizzle", "half_a_tile")

SEEDS = range(5)


def rows_for(fault: str) -> np.ndarray:
    # With one tile, so that no second tile overwrites the first.
    return rows(batch=2, count=32 if fault == "missing_barrier" else 64)


@pytest.mark.parametrize("seed", range(20))
def test_the_correct_kernel_passes_in_every_order(seed: int) -> None:
    x = rows(batch=3, count=96)
    np.testing.assert_array_equal(run_row_sums("none", x, seed=seed), sums(x))


@pytest.mark.parametrize("fault", REPORTS)
def test_a_broken_rule_is_reported_in_every_order(fault: str) -> None:
    instruction, message = REPORTS[fault]
    report = rf"^kernel {fault}: block \d, thread \d+, {instruction} {HERE}: {message}"
    for seed in SEEDS if fault != "endless_loop" else [0]:
        with pytest.raises(RuntimeError, match=report):
            run_row_sums(fault, rows_for(fault), seed=seed)


@pytest.mark.parametrize("fault", DEADLOCKS)
def test_a_deadlock_report_names_threads_and_lines(fault: str) -> None:
    report = rf"^kernel {fault}: block \d: deadlock, no thread can run; {DEADLOCKS[fault]}$"
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=report):
            run_row_sums(fault, rows_for(fault), seed=seed)


def test_every_fault_is_tested() -> None:
    names = list(load().kernels())
    faults = {x for x in names[names.index("none") + 1 :] if not x.startswith("sm90_")}
    assert faults == {*REPORTS, *DEADLOCKS, *WRONG_RESULTS}


def test_a_reader_with_another_swizzle_computes_wrong_sums() -> None:
    x = rows(batch=1, count=32)
    wrong = run_row_sums("other_swizzle", x) != sums(x)
    assert not wrong[:, ::8].any()  # there the swizzle changes nothing
    assert wrong.sum() > 20


def test_uninitialized_shared_memory_is_nan() -> None:
    x = rows(batch=2, count=32)
    result = run_row_sums("half_a_tile", x)
    np.testing.assert_array_equal(result[:, :16], sums(x)[:, :16])
    assert np.isnan(result[:, 16:]).all()


def test_a_failed_launch_does_not_affect_the_next() -> None:
    x = rows(batch=2, count=64)
    for fault in ("missing_wait", "divergent_shuffle", "lane_exits_early", "unfinished_copies"):
        with pytest.raises(RuntimeError):
            run_row_sums(fault, x)
        np.testing.assert_array_equal(run_row_sums("none", x), sums(x))


def test_the_seed_determines_the_order() -> None:
    def reports(fault: str) -> list[str]:
        texts = []
        for seed in range(8):
            with pytest.raises(RuntimeError) as error:
                run_row_sums(fault, rows_for(fault), seed=seed)
            texts.append(str(error.value))
        return texts

    assert reports("missing_wait") == reports("missing_wait")
    assert len(set(reports("missing_wait"))) > 4


def test_without_buffers_global_memory_is_not_checked() -> None:
    x = rows(batch=2, count=32)
    np.testing.assert_array_equal(run_row_sums("none", x, checked=False), sums(x))
    run_row_sums("two_writers", x, checked=False)
