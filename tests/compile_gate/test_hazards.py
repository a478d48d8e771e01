"""Registers of products under way, and those beyond the budget of a role, are not to be touched."""

from __future__ import annotations

import pytest

from tests.compile_gate.hazards import (
    RegisterBudget,
    hazards,
    register_budgets,
    register_faults,
)
from tests.compile_gate.sass_samples import FORWARD, product, program, wait


def test_a_loop_that_waits_has_no_hazard() -> None:
    assert hazards(program(FORWARD)) == []


@pytest.mark.parametrize(
    ("touch", "conflict"),
    [
        ("FMUL R90, R24, R91", "touches R24, accumulators"),
        ("MOV R24, RZ", "touches R24, accumulators"),
        ("@P0 STS [R90], R55", "touches R55, accumulators"),
        ("LDS.128 R96, [R90]", None),
        ("LDS.128 R100, [R90]", "writes R100, R101, R102, R103, the left operand"),
        ("FADD R90, R100, R101", None),
        (product("R24"), None),
        (product("R24", columns=32), "touches R24, R25, R26, R27, ..., accumulators"),
        (product("R60", "R24"), "touches R24, R25, R26, R27, accumulators"),
        (product("R56", columns=80), None),
        (product("R24", "R28"), "touches R28, R29, R30, R31, accumulators"),
        (product("R92", columns=16), "writes R96, R97, R98, R99, the left operand"),
    ],
    ids=lambda value: value.split(",")[0] if value else "none",
)
def test_what_must_leave_registers_alone(touch: str, conflict: str | None) -> None:
    left = "R96" if touch == product("R92", columns=16) else "R100"
    code = f"""
        {product("R24", left)}
        {touch}
        {wait(0)}
        {touch}
        EXIT
        """
    found = hazards(program(code))
    if conflict is None:
        assert found == []
    else:
        (fault,) = found
        assert fault.startswith(touch.split()[0].removeprefix("@P0"))
        assert f" at 0x10 {conflict}" in fault


def test_a_group_under_way_keeps_its_registers() -> None:
    code = f"""
        {product("R24", last=False)}
        {product("R24")}
        {product("R56")}
        {wait(1)}
        FMUL R90, R24, R24
        FMUL R90, R56, R56
        EXIT
        """
    (fault,) = hazards(program(code))
    assert "FMUL R90, R56, R56 at 0x50 touches R56" in fault
    assert "a wait for products must come first" in fault


def test_a_hazard_across_the_end_of_a_loop() -> None:
    # In the order of the lines R24 is read before any product has started.
    code = f"""
        .L_0:
            FMUL R90, R24, R91
            {product("R24")}
            %s
            @P0 BRA .L_0
            EXIT
        """
    assert hazards(program(code % wait(0))) == []
    (fault,) = hazards(program(code % "NOP"))
    assert "FMUL R90, R24, R91 at 0x0 touches R24, accumulators" in fault


def test_a_hazard_on_one_path_only() -> None:
    code = f"""
            {product("R24")}
            @P0 BRA .L_1
            {wait(0)}
            BRA .L_2
        .L_1:
            %s
        .L_2:
            FMUL R90, R24, R91
            EXIT
        """
    assert hazards(program(code % wait(0))) == []
    assert len(hazards(program(code % "NOP"))) == 1


def test_products_that_nobody_awaits_come_to_an_end() -> None:
    code = f".L_0:\n {product('R24')}\n @P0 BRA .L_0\n FADD R4, R55, R5\n EXIT"
    (fault,) = hazards(program(code))
    assert "FADD R4, R55, R5 at 0x20" in fault


# The producer gives registers up, and the consumers take them. Both call the same function.
ROLES = """
    LDG.E.128 R164, [R4.64]
    @P0 BRA .L_2
.L_1:
    USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
    @!P0 BRA .L_1
    CS2R R238, SRZ
    CALL.REL.NOINC .L_3
    EXIT
.L_2:
    USETMAXREG.DEALLOC.CTAPOOL 0x18
    CALL.REL.NOINC .L_3
    MOV R%d, RZ
    EXIT
.L_3:
    MOV R22, RZ
    RET.REL.NODEC R4 .L_1
"""


def test_roles_that_fit_their_registers() -> None:
    code = program(ROLES % 23)
    assert register_budgets(code) == [RegisterBudget(0x20, 240, 240), RegisterBudget(0x70, 24, 24)]
    assert register_faults(code) == []


def test_a_register_over_the_budget_is_found() -> None:
    assert register_faults(program(ROLES % 24)) == [
        "the code behind USETMAXREG at 0x70 uses 25 registers, but a thread has 24 there"
    ]
