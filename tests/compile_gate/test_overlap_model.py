"""The overlap model gives the busy fraction where it can be computed by hand."""

from __future__ import annotations

import pytest

from tests.compile_gate.overlap_model import Deadlock, busy_fraction
from tests.compile_gate.phases import Barrier, Step, Wait, Work
from tests.compile_gate.sass import Product


def product(cycles: int) -> Product:
    return Product(2 * cycles, frozenset(), frozenset(), commits=True)


def busy(*steps: Step, warpgroups: int = 1) -> float:
    return busy_fraction([steps], warpgroups, {})


def test_a_warpgroup_alone_overlaps_nothing_that_it_waits_for() -> None:
    assert busy(product(100), Wait(0), Work(300)) == pytest.approx(0.25)


def test_arithmetic_before_the_wait_is_free() -> None:
    assert busy(product(300), Work(300), Wait(0)) == pytest.approx(1)


def test_a_wait_may_leave_the_next_products_under_way() -> None:
    steps = [product(100), product(300), Wait(1), Work(300), Wait(0)]
    assert busy(*steps) == pytest.approx(1)
    assert busy(*steps[:2], Wait(0), Work(300)) == pytest.approx(400 / 700)


@pytest.mark.parametrize(
    ("work", "cycles"),
    [(Work(100), 100), (Work(100, half_rate=80), 160), (Work(100, special=50), 400)],
)
def test_the_slowest_unit_limits_arithmetic(work: Work, cycles: int) -> None:
    assert busy(product(100), Wait(0), work) == pytest.approx(100 / (100 + cycles))


def test_warpgroups_share_the_units() -> None:
    # Two warpgroups need 2 · 400 issue slots for 2 · 100 cycles of products.
    assert busy(product(100), Wait(0), Work(400), warpgroups=2) == pytest.approx(0.25, abs=0.02)


def test_another_warpgroup_fills_the_tensor_cores() -> None:
    assert busy(product(300), Wait(0), Work(100), warpgroups=2) == pytest.approx(1, abs=0.02)


TURNS = [Barrier(None, 2, waits=True), Barrier(None, 2, waits=False)]


@pytest.mark.parametrize("warpgroups", [2, 3])
def test_turns_make_products_and_arithmetic_alternate(warpgroups: int) -> None:
    half = [product(50)] * 8
    work = Work(400 * (warpgroups - 1) // 2, special=25)
    free = busy(*half, Wait(0), work, warpgroups=warpgroups)
    steps = [TURNS[0], *half, TURNS[1], Wait(0), work]
    assert busy(*steps, warpgroups=warpgroups) == pytest.approx(1, abs=0.02)
    assert free < 0.99
    # The loop may start in the middle of a turn.
    assert busy(*steps[3:], *steps[:3], warpgroups=warpgroups) == pytest.approx(1, abs=0.02)


def test_the_end_of_a_turn_holds_nothing_up() -> None:
    # The arithmetic starts as soon as the first of three products is ready.
    steps = [TURNS[0], product(100), product(100), product(300), TURNS[1], Wait(2), Work(400)]
    assert busy(*steps, Wait(0)) == pytest.approx(1)


def test_roles_hand_over_at_named_barriers() -> None:
    # The second role multiplies what the first computes, and the first waits until it has read it.
    writes = [Barrier(2, 2, waits=True), Work(100), Barrier(1, 2, waits=False)]
    reads = [Barrier(1, 2, waits=True), product(100), Wait(0), Barrier(2, 2, waits=False)]
    assert busy_fraction([writes, reads], 1, {2: 1}) == pytest.approx(0.5)
    with pytest.raises(Deadlock):
        busy_fraction([writes, reads], 1, {})


def test_all_warpgroups_meet_at_a_barrier() -> None:
    # Together they work 200 cycles, then multiply 200.
    steps = [Work(100), Barrier(1, 2, waits=True), product(100), Wait(0), Barrier(1, 2, waits=True)]
    assert busy(*steps, warpgroups=2) == pytest.approx(0.5)
