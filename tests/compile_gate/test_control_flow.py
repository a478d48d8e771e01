"""Loops over tiles, their roles and the ordinary path through an iteration."""

from __future__ import annotations

import pytest

from tests.compile_gate.control_flow import reachable, roles, successors
from tests.compile_gate.sass_samples import FORWARD, product, program


def path_of(code: str) -> list[str]:
    (role,) = roles(program(code))
    return [str(x) for x in role.path]


def test_the_ordinary_path_skips_the_mask() -> None:
    path = path_of(FORWARD)
    assert "FSEL R24, R24, -INF , P1" not in path
    assert len(path) == 11
    assert path[-1] == "BRA `(.L_0)"


def test_of_two_ways_the_ordinary_one_is_shorter() -> None:
    path = path_of(
        f"""
        .L_0:
            {product("R24")}
            @P0 BRA .L_1
            FADD R90, R90, R91
            FADD R90, R90, R92
            FADD R90, R90, R93
            BRA .L_2
        .L_1:
            FFMA R90, R90, R91, R92
        .L_2:
            @P1 BRA .L_0
            EXIT
        """
    )
    assert path[2:-1] == ["FFMA R90, R90, R91, R92"]


@pytest.mark.parametrize(
    "work", ["REDG.E.ADD.F32 desc[UR6][R8.64], R4", product("R60"), "BAR.ARV 0x1, 0x100"]
)
def test_the_ordinary_path_does_all_the_work(work: str) -> None:
    path = path_of(
        f"""
        .L_0:
            {product("R24")}
            @P0 BRA .L_1
            {work}
        .L_1:
            @P1 BRA .L_0
            EXIT
        """
    )
    assert path[2] == work


def test_a_tile_that_has_arrived_is_not_awaited() -> None:
    # The code that waits lies behind the end of the kernel, and is part of the loop.
    path = path_of(
        f"""
        .L_0:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
            @!P0 BRA .L_2
        .L_1:
            {product("R24")}
            @P1 BRA .L_0
            EXIT
        .L_2:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
            @!P0 BRA .L_2
            BRA .L_1
        """
    )
    assert len(path) == 4


TWO_LOOPS = f"""
.L_0:
    NOP
.L_1:
    {product("R24")}
    FADD R90, R90, R91
    @P1 BRA .L_1
.L_2:
    {product("R24")}
    @P2 BRA .L_2
    %s
    EXIT
"""


def test_loops_in_one_loop_are_one_role_whose_ordinary_loop_is_shorter() -> None:
    (role,) = roles(program(TWO_LOOPS % "@P3 BRA .L_0"))
    assert [len(loop) for loop in role.loops] == [2, 3]
    assert [x.name for x in role.path] == ["HGMMA", "BRA"]


def test_loops_of_which_none_leads_back_to_the_other_are_two_roles() -> None:
    assert [len(role.path) for role in roles(program(TWO_LOOPS % "NOP"))] == [3, 2]


def test_an_outer_loop_is_no_loop_over_tiles() -> None:
    (role,) = roles(
        program(
            f"""
            .L_0:
                {product("R60")}
            .L_1:
                {product("R24")}
                @P1 BRA .L_1
                @P2 BRA .L_0
                EXIT
            """
        )
    )
    assert len(role.path) == 2 and len(role.loops) == 1


def test_a_kernel_without_products_has_no_roles() -> None:
    assert roles(program(".L_0:\n FADD R4, R4, R5\n @P0 BRA .L_0\n EXIT")) == []


def test_what_can_follow() -> None:
    code = program(
        """
            @P0 BRA .L_1
            @!P0 BRA P1, .L_1
            BRA.DIV UR4, .L_1
            CALL.REL.NOINC .L_2
            @P0 EXIT
            BRA .L_1
            NOP
        .L_1:
            EXIT
        .L_2:
            RET.REL.NODEC R4 .L_1
            NOP
        """
    )
    graph = successors(code)
    assert [sorted(graph[i]) for i in range(9)] == [
        *([1, 7], [2, 7], [3, 7], [4, 8], [5], [7], [7], [], []),
    ]
    assert reachable(graph, 3) == {3, 4, 5, 7, 8}


def test_a_jump_to_an_unknown_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="the control flow of BRX R4 -0x10 is not known"):
        successors(program("BRX R4 -0x10\nEXIT"))


def test_a_loop_with_two_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="entered at 2 instructions"):
        roles(
            program(
                f"""
                    @P0 BRA .L_1
                .L_0:
                    {product("R24")}
                .L_1:
                    @P1 BRA .L_0
                    EXIT
                """
            )
        )
