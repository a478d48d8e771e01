"""The loops of a kernel are judged: exponentials, turns, predictions, length, registers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jvp_attn.backends.kernel_table import KERNELS
from tests.compile_gate.kernel_doc import HOPPER
from tests.compile_gate.loop_report import NO_LOOPS, LoopReport, read_loops
from tests.compile_gate.loop_rules import (
    EXPECTED_PHASES,
    ExpectedPhases,
    growth_faults,
    loop_faults,
)
from tests.compile_gate.sass_samples import FORWARD, product, program, wait

KERNEL = KERNELS["forward_bf16_d128_sm90"]
TURN = "BAR.SYNC.DEFER_BLOCKING R7, 0x100\n%s\nBAR.ARV R8, 0x100"


def judged(code: str) -> list[str]:
    return [*loop_faults(KERNEL, read_loops(program(code), warpgroups=2))]


def expect(monkeypatch: pytest.MonkeyPatch, **phases: object) -> None:
    monkeypatch.setitem(EXPECTED_PHASES, "forward", ExpectedPhases(**phases))  # type: ignore


@pytest.fixture(autouse=True)
def _expectations_of_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-made loops need not be as good as those of the kernels."""
    expect(monkeypatch, exposed=2)


def test_every_step_has_its_expectations() -> None:
    assert EXPECTED_PHASES.keys() == {kernel.step for kernel in HOPPER}


def test_the_numbers_of_a_loop() -> None:
    report = read_loops(program(FORWARD), warpgroups=2)
    assert report.numbers() == {
        "loop_instructions": 11,
        "loop_hgmma": 2,
        "loop_mufu": 3,
        "loop_exponentials": 3,
        "loop_overlapped": 3,
        "busy_percent": 100,
    }
    assert not report.roles[0].turns


def test_the_numbers_of_roles_are_summed() -> None:
    loop = f".L_%d:\n{product('R24')}\n{wait(0)}\nMUFU.EX2 R24, R24\n@P0 BRA .L_%d\n"
    report = read_loops(program(loop % (0, 0) + loop % (1, 1) + "EXIT"), warpgroups=1)
    numbers = report.numbers()
    assert (len(report.roles), numbers["loop_instructions"]) == (2, 8)
    assert (numbers["loop_exponentials"], numbers["loop_overlapped"]) == (2, 0)


def test_a_kernel_without_loops_has_no_prediction() -> None:
    assert NO_LOOPS.numbers()["busy_percent"] is None
    assert read_loops(program("EXIT"), warpgroups=1) == NO_LOOPS


def test_barriers_that_are_not_understood_have_no_prediction() -> None:
    code = f".L_0:\nBAR.SYNC.DEFER_BLOCKING 0x1, 0x180\n{product('R24')}\n@P0 BRA .L_0\nEXIT"
    assert read_loops(program(code), warpgroups=2).busy is None
    assert read_loops(program("BAR.ARV 0x1, 0x180\n" + code), warpgroups=2).busy is None
    assert read_loops(program(code.replace("0x180", "0x100")), warpgroups=2).busy == 1


def test_an_arrival_before_the_loops_counts() -> None:
    code = f"""
        BAR.ARV 0x2, 0x100
        .L_0:
            BAR.SYNC.DEFER_BLOCKING 0x2, 0x100
            BAR.ARV 0x1, 0x100
            {product("R24")}
            @P0 BRA .L_0
        .L_1:
            BAR.SYNC.DEFER_BLOCKING 0x1, 0x100
            BAR.ARV 0x2, 0x100
            {product("R24")}
            @P0 BRA .L_1
            EXIT
        """
    assert read_loops(program(code), warpgroups=1).busy == 1
    without = code.replace("BAR.ARV 0x2, 0x100", "NOP", 1)
    assert read_loops(program(without), warpgroups=1).busy is None


# ----------------------------------------------------------------------------
# Judging


def test_a_good_loop_has_no_fault() -> None:
    assert judged(FORWARD) == []


def test_an_exponential_outside_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    hoisted = FORWARD.replace(wait(1), f"{wait(1)}\n{wait(0)}")
    assert judged(hoisted) == [
        "in the loop at 0x0, 3 of 3 exponentials are computed while no product of the same "
        "warpgroup is under way, the first at 0x70; at most 2 may be"
    ]
    expect(monkeypatch, exposed=3)
    assert judged(hoisted) == []


def test_turns_that_are_missing_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, turns=(128,))
    assert judged(FORWARD) == [
        "the loop at 0x0 has no barrier whose number depends on the warpgroup, but warpgroups "
        "should take turns at the tensor cores"
    ]
    products = f"{product('R24')}\n    {product('R56', 'R100')}"
    assert products in FORWARD
    assert judged(FORWARD.replace(products, TURN % products)) == []
    expect(monkeypatch, turns=(64,))
    assert judged(FORWARD) == []


def test_idle_tensor_cores_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, busy_percent={128: 95})
    assert judged(FORWARD) == []
    report = replace(read_loops(program(FORWARD), warpgroups=2), busy=0.944)
    assert [*loop_faults(KERNEL, report)] == [
        "the model predicts 94% for the time in which the tensor cores are busy; at least 95% is "
        "expected"
    ]
    assert [*loop_faults(KERNEL, replace(report, busy=0.946))] == []
    (fault,) = loop_faults(KERNEL, replace(report, busy=None))
    assert fault.startswith("the model predicts nothing for the time")


def test_touched_registers_are_faults() -> None:
    code = FORWARD.replace(wait(0), f"FMUL R80, R80, R90\n{wait(0)}")
    (fault,) = judged(code)
    assert "FMUL R80, R80, R90 at 0x90 touches R80, accumulators" in fault
    (fault,) = judged(f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x60\n{FORWARD}")
    assert "at 0x0 uses 104 registers, but a thread has 96 there" in fault


def test_only_a_few_of_many_hazards_are_described() -> None:
    code = FORWARD.replace(wait(0), "FMUL R80, R80, R90\n" * 5 + wait(0))
    found = judged(code)
    assert len(found) == 4
    assert found[3] == "2 more instructions touch registers of products under way"


def test_a_loop_may_not_grow_by_more_than_5_percent() -> None:
    def of(instructions: int) -> LoopReport:
        (role,) = read_loops(program(FORWARD), warpgroups=2).roles
        return LoopReport((replace(role, instructions=instructions),))

    assert [*growth_faults(of(630), 600)] == []
    assert [*growth_faults(of(300), 600)] == []
    assert [*growth_faults(of(631), None)] == []
    (fault,) = growth_faults(of(631), 600)
    assert fault.startswith(
        "an iteration takes 631 instructions on its ordinary path, more than 5%"
    )
    assert "above the 600 of the recorded report" in fault
