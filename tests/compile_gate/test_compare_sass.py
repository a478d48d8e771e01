"""compare_sass sees changed, moved and missing instructions, and ignores renumbered registers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.compile_gate import compare_sass
from tests.compile_gate.compare_sass import (
    IDENTICAL,
    RENUMBERED,
    compare,
    compare_builds,
    read_sass,
    renamed,
    summary,
)

# As cuobjdump prints it: an empty kernel of sm_80, and one of sm_90a.
SASS = """
Fatbin elf code:
================
arch = sm_80
compile_size = 64bit

\tcode for sm_80
\t.target\tsm_80

\t\tFunction : _ZN8jvp_attn4sm9010run_kernelINS0_7ForwardEEvNS0_6ParamsE
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x00000a0000017a02 */
                                                           /* 0x000fe40000000f00 */
        /*0010*/                   EXIT ;                  /* 0x000000000000794d */
        /*0020*/                   BRA 0x20;               /* 0xfffffff000007947 */
        /*0030*/                   NOP;                    /* 0x0000000000007918 */
\t\t..........

Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : _ZN8jvp_attn4sm9010run_kernelINS0_7ForwardEEvNS0_6ParamsE
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 BRA 0x340 ;             /* 0x0000000000b00947 */
        /*0020*/                   FFMA R4, R2, R3, R4 ;   /* 0x0000000203047223 */
        /*0030*/                   EXIT ;                  /* 0x000000000000794d */
        /*0040*/                   BRA 0x40;               /* 0xfffffff000007947 */
        /*0050*/                   NOP;                    /* 0x0000000000007918 */
"""
KERNEL = ["LDC R1, c[0x0][0x28]", "@!P0 BRA 0x340", "FFMA R4, R2, R3, R4", "EXIT"]


def test_kernels_are_read_by_architecture_without_padding_and_empty_ones() -> None:
    assert read_sass(SASS) == {"sm_90a": KERNEL}


def test_equal_kernels_are_identical() -> None:
    assert compare(KERNEL, list(KERNEL)) == IDENTICAL


def test_other_numbers_of_registers_predicates_and_constant_banks_do_not_count() -> None:
    other = ["LDC R7, c[0x3][0x28]", "@!P2 BRA 0x340", "FFMA R9, R5.reuse, R3, R9", "EXIT"]
    assert compare(KERNEL, other) == RENUMBERED


@pytest.mark.parametrize(
    ("other", "result"),
    [
        ([*KERNEL[:3], "FADD R4, R4, R4", KERNEL[3]], "4 -> 5 instructions, 4 .*; \\+1 FADD"),
        ([KERNEL[0], *KERNEL[2:]], "4 -> 3 instructions, 3 .*; -1 BRA"),
        ([KERNEL[0], KERNEL[2], KERNEL[1], KERNEL[3]], "only the order or the operands changed"),
        ([*KERNEL[:2], "FFMA R4, -R2, R3, R4", KERNEL[3]], "only the order or the operands"),
        (["LDC R1, c[0x0][0x30]", *KERNEL[1:]], "only the order or the operands changed"),
    ],
    ids=["added", "removed", "moved", "negated operand", "another parameter"],
)
def test_other_instructions_count(other: list[str], result: str) -> None:
    assert re.search(result, compare(KERNEL, other))


def test_kernels_are_matched_by_their_new_names() -> None:
    before = renamed(
        {("forward_tangent_bf16", "sm_80"): KERNEL, ("forward_bf16", "sm_80"): KERNEL},
        [("forward_tangent", "forward_jvp")],
    )
    after = {("forward_jvp_bf16", "sm_80"): KERNEL, ("backward_bf16", "sm_80"): KERNEL}
    results = compare_builds(before, after)
    assert results == {
        ("backward_bf16", "sm_80"): "missing before",
        ("forward_bf16", "sm_80"): "missing after",
        ("forward_jvp_bf16", "sm_80"): IDENTICAL,
    }
    assert summary(results) == "sm_80: 1 identical, 0 registers renumbered, 2 different or missing"


@pytest.mark.parametrize(("other", "status"), [(KERNEL, 0), (KERNEL[1:], 1)])
def test_the_exit_status_tells_of_differences(
    other: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    builds = {
        Path("before"): {("forward_bf16", "sm_80"): KERNEL},
        Path("after"): {("forward_bf16", "sm_80"): other},
    }
    monkeypatch.setattr(compare_sass, "read_build", lambda folder, *_: builds[folder])
    monkeypatch.setattr(sys, "argv", ["compare_sass.py", "before", "after"])
    with pytest.raises(SystemExit) as end:
        compare_sass.main()
    assert end.value.code == status
    assert ("forward_bf16 sm_80: " in capsys.readouterr().out) == bool(status)
