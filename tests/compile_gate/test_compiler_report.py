"""The compile gate reads the report of ptxas and counts instructions; the samples are shortened."""

from __future__ import annotations

import pytest

from tests.compile_gate.compiler_report import (
    Instructions,
    PtxasReport,
    count_instructions,
    read_ptxas,
)
from tests.compile_gate.sass import parse

CLEAN = """\
ptxas info    : 4097 bytes gmem
ptxas info    : Compiling entry function '_ZN8jvp_attn10run_kernelINS_3ToyEEEv' for 'sm_80'
ptxas info    : Function properties for _ZN8jvp_attn10run_kernelINS_3ToyEEEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 44 registers, used 1 barriers, 1184 bytes cmem[0]
ptxas info    : Compile time = 12.148 ms
"""

SPILLING = """\
ptxas info    : 1 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN8jvp_attn10run_kernelINS_3ToyEEEv' for 'sm_80'
ptxas info    : Function properties for _ZN8jvp_attn10run_kernelINS_3ToyEEEv
    4048 bytes stack frame, 5068 bytes spill stores, 5052 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4048 bytes cumulative stack size, 1184 bytes cmem[0]
ptxas info    : Compile time = 176.502 ms
"""  # noqa: E501

DISASSEMBLY = """\
\t.target\tsm_80

//--------------------- .text._ZN8jvp_attn10run_kernelINS_3ToyEEEv --------------------------
\t.section\t.text._ZN8jvp_attn10run_kernelINS_3ToyEEEv,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=44"
.text._ZN8jvp_attn10run_kernelINS_3ToyEEEv:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   STL.128 [R1], RZ ;
        /*0190*/                   LDGSTS.E.BYPASS.128 [R40], [R2.64] ;
        /*01a0*/                   LDGDEPBAR ;
        /*01d0*/              @!P0 BRA `(.L_x_0) ;
        /*01e0*/              @P1  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*01f0*/              @UP0 UIADD3 UR4, UR5, -0x1, URZ ;
        /*0200*/                   MUFU.EX2 R6, R6 ;
.L_x_0:
        /*10210*/                  LDL.LU R7, [R1+0x10] ;
        /*10220*/                  EXIT ;
        /*10230*/                  NOP;
"""


def test_a_kernel_that_fits_its_registers() -> None:
    assert read_ptxas(CLEAN) == PtxasReport(44, 0, 0, 0, 4097, ())


def test_a_kernel_that_spills() -> None:
    assert read_ptxas(SPILLING) == PtxasReport(32, 5068, 5052, 4048, 1, ())


def test_warnings_are_kept() -> None:
    text = "ptxas kernel.ptx, line 9; warning : Setmaxnreg ignored\nptxas warning : Slow\n" + CLEAN
    assert read_ptxas(text).warnings == ("Setmaxnreg ignored", "Slow")


def test_advice_on_slow_code_is_a_warning() -> None:
    advice = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert read_ptxas(f"ptxas info    : {advice}\n{CLEAN}").warnings == (advice,)


@pytest.mark.parametrize("text", ["", CLEAN + CLEAN, "nvcc fatal : no input files\n"])
def test_a_report_must_be_of_one_kernel(text: str) -> None:
    with pytest.raises(ValueError, match="ptxas should describe one kernel"):
        read_ptxas(text)


def test_of_several_gpus_one_report_is_read_and_all_warnings_are_kept() -> None:
    warning = "ptxas info    : (C7510) Potential Performance Loss: serialized\n"
    both = CLEAN + warning + SPILLING.replace("sm_80", "sm_90a")
    assert read_ptxas(both, "sm_80").registers == 44
    spilling = read_ptxas(both, "sm_90a")
    assert (spilling.registers, spilling.spill_stores) == (32, 5068)
    assert spilling.warnings == ("(C7510) Potential Performance Loss: serialized",)
    with pytest.raises(ValueError, match="ptxas should describe one kernel"):
        read_ptxas(both, "sm_90")


def test_a_function_that_is_called_is_not_inlined() -> None:
    called = "ptxas info    : Function properties for helper\n" + CLEAN.splitlines(True)[3]
    with pytest.raises(ValueError, match="all of it inlined"):
        read_ptxas(CLEAN + called)


def test_instructions_are_counted_whatever_their_predicates() -> None:
    assert count_instructions(parse(DISASSEMBLY)) == Instructions(
        total=10, hmma=1, ldgsts=1, mufu=1, local=2
    )
