"""Machine code is read as nvdisasm prints it: operands, registers, products."""

from __future__ import annotations

import pytest

from tests.compile_gate.sass import Instruction, parse
from tests.compile_gate.sass_samples import product, program


def instruction(text: str) -> Instruction:
    return program(text).instructions[0]


def test_the_parts_of_an_instruction() -> None:
    text = "        /*01d0*/              @!P0 BRA.DIV UR4, `(.L_x_9) ;\n.L_x_9:\n"
    found = parse(text + "        /*01e0*/                   NOP;\n")
    branch, nop = found.instructions
    assert (branch.address, branch.predicate, branch.name, branch.modifiers) == (
        *(0x1D0, "@!P0", "BRA", ".DIV"),
    )
    assert (branch.operands, branch.target) == ("UR4, `(.L_x_9)", ".L_x_9")
    assert str(branch) == "BRA.DIV UR4, `(.L_x_9)"
    assert (nop.name, nop.operands, nop.target) == ("NOP", "", None)
    assert found.labels == {".L_x_9": 1}


@pytest.mark.parametrize(
    ("text", "touched", "written"),
    [
        ("FFMA R4, R5.reuse, -R6, |R7|", {4, 5, 6, 7}, {4}),
        ("IMAD.U32 R4, RZ, RZ, UR9", {4}, {4}),
        ("IMAD.WIDE.U32 R4, R6, R9, R10", {4, 5, 6, 9, 10, 11}, {4, 5}),
        ("CS2R R4, SRZ", {4, 5}, {4, 5}),
        ("LDS.128 R4, [R9+URZ+0x10]", {4, 5, 6, 7, 9}, {4, 5, 6, 7}),
        ("LDG.E.64 R4, desc[UR6][R8.64+0x8]", {4, 5, 8, 9}, {4, 5}),
        ("LDSM.16.M88.4 R4, [R9]", {4, 5, 6, 7, 9}, {4, 5, 6, 7}),
        ("STS.128 [R9], R4", {4, 5, 6, 7, 9}, set()),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR6][R8.64], R4", {4, 5, 6, 7, 8, 9}, set()),
        ("FSETP.NEU.AND P1, PT, R4, RZ, PT", {4}, set()),
        ("SHFL.BFLY PT, R4, R5, 0x2, 0x1f", {4, 5}, {4}),
        ("LOP3.LUT P0, R4, R5, 0x7f, RZ, 0xc0, !PT", {4, 5}, {4}),
        ("BAR.SYNC.DEFER_BLOCKING R4, 0x100", {4}, set()),
        ("R2UR UR4, R4", {4}, set()),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_the_registers_of_an_instruction(text: str, touched: set[int], written: set[int]) -> None:
    found = instruction(text)
    assert (found.touched, found.written) == (touched, written)


def test_a_product_has_two_registers_for_each_four_columns() -> None:
    shared = instruction(product("R24", columns=176, last=False)).product
    assert shared is not None
    assert (shared.accumulators, shared.fragment) == ({*range(24, 112)}, set())
    assert (shared.cycles, shared.commits) == (88, False)


def test_a_left_operand_in_registers_has_four() -> None:
    found = instruction(product("R24", "R100"))
    assert found.product is not None and found.product.commits
    assert found.product.fragment == {100, 101, 102, 103}
    assert found.touched == {*range(24, 56), *range(100, 104)}
    assert found.written == {*range(24, 56)}


def test_a_wait_leaves_groups_under_way() -> None:
    assert instruction("WARPGROUP.DEPBAR.LE gsb0, 0x1").pending == 1
    assert instruction("WARPGROUP.ARRIVE").pending is None


def test_other_products_are_not_guessed() -> None:
    with pytest.raises(
        ValueError, match=r"HGMMA\.64x64x8\.F32\.TF32 .* is not a product of 16-bit"
    ):
        _ = instruction("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24").product


def test_a_disassembly_must_have_instructions() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        parse("\t.target\tsm_80\n")
