"""Phases of a loop: products, waits, barriers, and the arithmetic between them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.compile_gate.control_flow import roles
from tests.compile_gate.phases import (
    Barrier,
    Wait,
    Work,
    describe,
    exposed_exponentials,
    steps,
    tensor_cycles,
)
from tests.compile_gate.sass import Instruction, Product
from tests.compile_gate.sass_samples import FORWARD, product, program, wait


def path_of(code: str) -> Sequence[Instruction]:
    return roles(program(code))[0].path


def lines(*instructions: str) -> str:
    return "\n".join([".L_0:", *instructions, "@P0 BRA .L_0", "EXIT"])


def test_the_steps_of_forward() -> None:
    found = list(steps(path_of(FORWARD)))
    kinds = [Work, Product, Work, Product, Work, Wait, Work, Wait, Work]
    assert [type(x) for x in found] == kinds
    # A maximum and three exponentials between the waits, with the branch and the wait itself.
    assert found[6] == Work(issue=6, half_rate=1, special=3)
    assert (found[5], found[7]) == (Wait(1), Wait(0))
    assert sum(x.issue for x in found if isinstance(x, Work)) == len(path_of(FORWARD))
    assert tensor_cycles(path_of(FORWARD)) == 64


def test_named_barriers() -> None:
    code = lines(
        *("BAR.SYNC.DEFER_BLOCKING R7, 0x100", product("R24"), "BAR.ARV R8, 0x100"),
        *("BAR.ARV 0x2, 0x180", "BAR.SYNC.DEFER_BLOCKING R7, 0x80"),
    )
    found = [x for x in steps(path_of(code)) if isinstance(x, Barrier)]
    assert found == [
        *(Barrier(None, 2, waits=True), Barrier(None, 2, waits=False)),
        *(Barrier(2, 3, waits=False), Barrier(None, 1, waits=True)),
    ]
    assert [x.is_turn for x in found] == [True, True, False, False]


def test_a_barrier_of_the_whole_block_in_a_loop_is_an_error() -> None:
    with pytest.raises(ValueError, match="stops the whole block"):
        list(steps(path_of(lines("BAR.SYNC.DEFER_BLOCKING 0x0", product("R24")))))


def test_the_exponentials_of_forward_lie_between_the_waits() -> None:
    assert exposed_exponentials(path_of(FORWARD)) == []


def test_a_wait_that_the_compiler_hoists_exposes_the_exponentials() -> None:
    code = FORWARD.replace(wait(1), f"{wait(1)}\n{wait(0)}")
    assert [str(x) for x in exposed_exponentials(path_of(code))] == [
        *("MUFU.EX2 R91, R90", "MUFU.EX2 R24, R24", "MUFU.EX2 R25, R25"),
    ]


def test_exponentials_among_products_are_overlapped() -> None:
    code = lines(product("R24", last=False), "MUFU.EX2 R90, R90", product("R24"), wait(0))
    assert exposed_exponentials(path_of(code)) == []


def test_products_stay_under_way_from_one_iteration_to_the_next() -> None:
    first = "MUFU.EX2 R90, R90"
    assert exposed_exponentials(path_of(lines(first, product("R24")))) == []
    assert len(exposed_exponentials(path_of(lines(first, product("R24"), wait(0))))) == 1


def test_a_wait_starts_nothing() -> None:
    code = lines(product("R24"), wait(0), wait(1), "MUFU.EX2 R90, R90")
    assert len(exposed_exponentials(path_of(code))) == 1


def test_other_special_functions_are_no_exponentials() -> None:
    assert exposed_exponentials(path_of(lines("MUFU.RCP R90, R90", product("R24"), wait(0)))) == []


def test_the_description_has_a_line_for_each_phase() -> None:
    code = lines(
        *("FADD R90, R90, R91", product("R24", last=False), "UMOV UR4, UR5", product("R24")),
        *("MUFU.EX2 R90, R90", wait(0)),
    )
    assert describe(path_of(code)) == [
        "          1 issue slots, 0 special functions",
        "0x00010 2 x HGMMA.64x64x16.F32.BF16 R24: 64 cycles of the tensor cores; "
        "1 issue slots, 0 special functions among them",
        "          1 issue slots, 1 special functions",
        "0x00050 WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "          1 issue slots, 0 special functions",
    ]
