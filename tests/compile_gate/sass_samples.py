"""Hand-made machine code for the tests of the compile gate."""

from __future__ import annotations

import re

from tests.compile_gate.sass import Program, parse


def program(code: str) -> Program:
    """Instructions and labels, a line each, as nvdisasm would print them."""
    lines, address = [], 0
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {_quoted(line)} ;")
            address += 0x10
    return parse("\n".join(lines))


def _quoted(line: str) -> str:
    """Labels are printed as `(.L_x_0)."""
    return re.sub(r"(?<!\()(\.L_\w+)", r"`(\1)", line)


def product(registers: str, left: str = "gdesc[UR4]", columns: int = 64, last: bool = True) -> str:
    """A product; `last` of its group."""
    names = (
        f"{registers}, {left}" if left.startswith("gdesc") else f"{registers}, {left}, gdesc[UR4]"
    )
    return f"HGMMA.64x{columns}x16.F32.BF16 {names}, {registers}" + (", gsb0" if last else "")


def wait(pending: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {pending:#x}"


# The loop of a forward with 64 columns of S in R24 and of O in R56. S of the next tile and O of
# this one are started together; the exponentials of S lie between the waits for the two.
FORWARD = f"""
.L_0:
    {product("R24")}
    {product("R56", "R100")}
    {wait(1)}
    @!P0 BRA .L_1
    FSEL R24, R24, -INF , P1
.L_1:
    FMNMX R90, R24, R25, !PT
    MUFU.EX2 R91, R90
    MUFU.EX2 R24, R24
    MUFU.EX2 R25, R25
    {wait(0)}
    F2FP.BF16.F32.PACK_AB R100, R25, R24
    @P2 BRA .L_0
    EXIT
"""
