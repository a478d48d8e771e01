"""The emulator reports what is wrong in a faulty sm90 kernel, and where."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.probe_kernels import load, run_tile_products, small_integers

BATCH, KEYS = 2, 320

SHARED = r"shared_memory\(\) \+ \d+"
HERE = (
    r"\((tests/emulator/probes/tile_products\.h|csrc/common/fragment\.cuh|csrc/sm90/turns\.cuh)"
    r":\d+\)"
)
THREADS = r"threads? [\d, -]+"
LAST_WORD = rf"{SHARED}, which thread \d+'s \w+ {HERE} (wrote|read) with no"
NOT_WAITED = rf"{LAST_WORD} wait for it between"
STILL_COPYING = (
    rf"touches what thread \d+'s tma_load_4d {HERE} is still copying: "
    "its mbarrier does not count it"
)
MBARRIER = rf"the mbarrier at {SHARED}, in phase [01] with \d+ of \d+ arrivals"

# By fault, the instruction that fails and what the report says of it.
REPORTS = {
    "missing_proxy_fence": (
        "wgmma",
        rf"reads {SHARED}, which (?P<writer>thread \d+)'s store_matrices {HERE} wrote with no "
        r"fence_proxy_async of (?P=writer) between",
    ),
    "missing_proxy_fence_after_read": (
        "tma_load_4d",
        rf"writes {SHARED}, which (?P<reader>thread \d+)'s shared_load_words4 {HERE} read with no "
        r"fence_proxy_async of (?P=reader) between",
    ),
    "missing_named_barrier": ("wgmma", rf"reads {LAST_WORD} barrier between"),
    "named_barrier_counts_differ": (
        "named_barrier_sync",
        r"barrier [12] with (128|256) threads, but other warps with (128|256)",
    ),
    # Either the next turn has not been taken yet, or it is taken at once and one is left over.
    "turn_passed_twice": (
        "named_barrier_arrive",
        r"the warp has already arrived at barrier 4, which still waits for others|"
        r"the block ends with barrier 4, at which 128 of 256 threads have arrived",
    ),
    "turn_passed_to_itself": (
        "named_barrier_sync",
        "the warp has already arrived at barrier 3, which still waits for others",
    ),
    "turn_left_over": (
        "named_barrier_arrive",
        "the block ends with barrier 3, at which 128 of 256 threads have arrived",
    ),
    "address_differs_between_lanes": (
        "warp_uniform",
        r"the address must be the same for all of the warp, but it differs from that of thread \d+",
    ),
    "missing_barrier_after_init": (
        r"mbarrier_(wait|arrive_expect)",
        rf"reads {LAST_WORD} barrier between|there is no mbarrier at {SHARED}",
    ),
    "missing_init_fence": (
        "tma_load_4d",
        rf"uses {MBARRIER} and 16384 bytes missing, with no fence_mbarrier_init by thread 0",
    ),
    "no_mbarrier": ("mbarrier_wait", rf"there is no mbarrier at {SHARED}"),
    "constant_phase": ("(tma_load_4d|wgmma)", f"{STILL_COPYING}|(reads|writes) {LAST_WORD}"),
    "expects_too_little": ("wgmma", f"{STILL_COPYING}|reads {NOT_WAITED}"),
    "too_many_arrivals": (
        r"(tma_load_4d|wgmma|mbarrier_arrive|\w+)",
        rf"{STILL_COPYING}|(reads|writes) {LAST_WORD}|arrives at {MBARRIER}.*: all arrivals",
    ),
    "missing_wait_for_empty": (
        "(mbarrier_arrive_expect|tma_load_4d)",
        rf"arrives at {MBARRIER}.*: all arrivals of the phase|(touches|writes) .*",
    ),
    "released_too_early": ("tma_load_4d", f"writes {NOT_WAITED}"),
    "misaligned_tma_target": ("tma_load_4d", f"{SHARED} is not aligned to 1024 bytes"),
    "null_tensor_map": ("tma_load_4d", "the tensor map is null"),
    "unfinished_tma_load": (
        "(tma_load_4d|mbarrier_arrive_expect)",
        rf"the block ends(, and no thread has waited for the bytes of| with) {MBARRIER}",
    ),
    "missing_wgmma_fence": ("wgmma", "there is no wgmma_fence since the last wgmma_wait"),
    "missing_wgmma_wait": (
        "pack",
        "its operand comes from an accumulator of a wgmma that is still in flight",
    ),
    "missing_wgmma_commit": (
        "pack",
        "its operand comes from an accumulator of a wgmma that is still in flight",
    ),
    "unfinished_wgmma": ("wgmma", "the thread ends before the wgmma_wait"),
    "accumulator_changed": ("wgmma", "its accumulator was changed before the wgmma_wait"),
    "accumulator_fenced": (
        "warpgroup_fence_operand",
        rf"fences registers that thread \d+'s wgmma {HERE} works on",
    ),
    "operand_changed": ("wgmma", "its operand in registers was changed before the wgmma_wait"),
    "operand_changed_after_fence": (
        "wgmma",
        "an operand in registers was changed after the last wgmma_fence",
    ),
    "misaligned_descriptor": (
        "wgmma",
        "the descriptor starts in row 1 of the swizzle pattern, and its base offset is 0",
    ),
    "other_swizzle": ("wgmma", "the descriptor's swizzle mode is 2; only 1"),
    "divergent_wgmma": (
        "wgmma",
        rf"must be the same for all threads of the warpgroup, but it differs from thread \d+'s "
        rf"wgmma {HERE}",
    ),
    "fewer_registers": ("warpgroup_reg_alloc", "160 registers are fewer than the 168"),
    "different_registers": (
        "warpgroup_reg_alloc",
        r"(232|240) registers, but warp \d+ of the warpgroup has requested (232|240)",
    ),
    "store_instead_of_add": (
        "global_store",
        r"writes byte \d+ of delta, which thread \d+ of block \d has written in this launch",
    ),
    "store_where_others_add": (
        "global_(store|add)",
        r"writes byte \d+ of delta, which (threads add to|thread \d+ of block \d has written) "
        "in this launch",
    ),
    "read_where_others_add": (
        "global_load",
        r"reads byte \d+ of delta, which threads add to in this launch",
    ),
    "add_out_of_range": (
        "global_add4",
        "writes 16 bytes of global memory outside of every buffer: the nearest, mu, has 1024 bytes",
    ),
    "misaligned_add": ("global_add4", "the global address is 8 bytes past a multiple of 16"),
    "add_in_flight": (
        "global_add4",
        "its operand comes from an accumulator of a wgmma that is still in flight",
    ),
}
DEADLOCKS = {
    "turn_never_passed": (
        rf"waiting at named_barrier_sync {HERE} for barrier [34], at which 128 of 256 threads have "
        "arrived: threads 128-255.* for barrier [34], at which 128 of 256 threads have arrived: "
        "threads 256-383"
    ),
    "named_barrier_of_too_many": (
        rf"waiting at named_barrier_sync {HERE} for barrier 1, at which 128 of 160 threads have "
        "arrived: threads 128-255"
    ),
    "expects_too_much": (
        rf"waiting at mbarrier_wait {HERE} for {MBARRIER} and 16 bytes missing: threads 128-383"
    ),
    "missing_arrival": (
        rf"waiting at mbarrier_wait {HERE} for the mbarrier at {SHARED}, in phase 0 with 1 of 2 "
        "arrivals: threads 128-383"
    ),
    "warp_without_wgmma": (
        rf"waiting at wgmma_wait {HERE} for wgmmas that not all warps of the warpgroup have "
        "issued: they have issued 4 4 4 0: threads 128-223, 256-351$"
    ),
    "too_many_registers": (
        rf"waiting at warpgroup_reg_alloc {HERE} for registers: 16 for each thread of a warp are "
        f"free: {THREADS}"
    ),
}
# Accesses to wrong addresses, which the emulator reports if they race.
WRONG_ADDRESSES = ("wrong_phase", "wrong_leading_offset", "wrong_stride_offset")

SEEDS = range(5)


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = ((128, 64), (KEYS, 64), (KEYS, 128))
    return tuple(small_integers(BATCH, *shape, seed=i) for i, shape in enumerate((q, k, v)))


def run(fault: str, seed: int) -> dict[str, np.ndarray]:
    return run_tile_products(fault, *matrices(), seed=seed)


@pytest.mark.parametrize("seed", range(20))
def test_the_correct_kernel_passes_in_every_order(seed: int) -> None:
    q, k, v = matrices()
    found = run("none", seed)
    expected = (q @ k.transpose(0, 2, 1)) @ v
    np.testing.assert_array_equal(found["out"], expected)
    np.testing.assert_array_equal(found["tout"], expected)
    first_elements = k[..., 0].reshape(BATCH, KEYS // 64, 64).sum(1)
    np.testing.assert_array_equal(found["lse"], np.tile(first_elements, (1, 4)))
    np.testing.assert_array_equal(found["delta"], 4 * first_elements)
    # Lane 4g + t of each warp has rows g and g + 8, and of these the columns 2t and 2t + 1.
    of_lanes = expected[..., :8].reshape(BATCH, 8, 2, 8, 4, 2).sum(1).transpose(0, 2, 3, 1, 4)
    np.testing.assert_array_equal(found["mu"], of_lanes.reshape(BATCH, 128))


@pytest.mark.parametrize("fault", REPORTS)
def test_a_broken_rule_is_reported_in_every_order(fault: str) -> None:
    instruction, message = REPORTS[fault]
    report = rf"^kernel sm90_{fault}: block \d, thread \d+, {instruction} {HERE}: ({message})"
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=report):
            run(fault, seed)


@pytest.mark.parametrize("fault", DEADLOCKS)
def test_a_deadlock_report_names_threads_and_barriers(fault: str) -> None:
    report = rf"^kernel sm90_{fault}: block \d: deadlock, no thread can run; .*{DEADLOCKS[fault]}"
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=report):
            run(fault, seed)


@pytest.mark.parametrize("fault", WRONG_ADDRESSES)
def test_wrong_addresses_are_reported_or_give_wrong_results(fault: str) -> None:
    q, k, v = matrices()
    expected = (q @ k.transpose(0, 2, 1)) @ v
    for seed in SEEDS:
        try:
            found = run(fault, seed)
        except RuntimeError:
            continue
        assert not np.array_equal(found["out"], expected)


def test_every_fault_is_tested() -> None:
    names = {name for name in load().kernels() if name.startswith("sm90_")}
    tried = {"none", *REPORTS, *DEADLOCKS, *WRONG_ADDRESSES}
    assert names == {f"sm90_{fault}" for fault in tried}


def test_a_failed_launch_does_not_affect_the_next() -> None:
    expected = run("none", 0)["out"]
    for fault in ("missing_proxy_fence", "expects_too_much", "missing_wgmma_wait"):
        with pytest.raises(RuntimeError):
            run(fault, 0)
        np.testing.assert_array_equal(run("none", 0)["out"], expected)
