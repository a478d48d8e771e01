"""Every kernel compiles without spills or warnings, and the gate finds those that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry
from tests.compile_gate.compile_gate import (
    MAX_SHARED_BYTES,
    SETUP,
    Compiled,
    NotBuilt,
    all_faults,
    as_json,
    as_phases,
    as_table,
    compile_all,
    faults,
    read_build,
    read_built,
    recorded_instructions,
    row,
)
from tests.compile_gate.compiler_report import Instructions, PtxasReport
from tests.compile_gate.loop_report import LoopReport, RoleReport

GATE = "tests.compile_gate.compile_gate"

needs_nvcc = pytest.mark.skipif(SETUP.find_toolkit() is None, reason="nvcc is not installed")

TANGENT = KERNELS["forward_jvp_bf16_d128"]
HOPPER = KERNELS["forward_jvp_bf16_d128_sm90"]
PREPROCESS = KERNELS["preprocess_bf16"]
REGISTERS = PtxasReport(250, 0, 0, 0, 0, ())
GOOD = Compiled(REGISTERS, Instructions(7800, hmma=256, ldgsts=40, mufu=32), 65536)
ROLE = RoleReport(0x3000, 100, 19, 44, 42, exposed=(), turns=True, phases=("4 x HGMMA", "a wait"))
LOOPS = LoopReport((ROLE,), busy=0.976)
GOOD_HOPPER = Compiled(
    REGISTERS, Instructions(4700, hgmma=55, utmaldg=16, usetmaxreg=2, mufu=60), 65536, LOOPS
)


# ----------------------------------------------------------------------------
# Judging


def regressed(good: Compiled = GOOD, **changes: object) -> Compiled:
    """The same kernel with other numbers."""
    shared_bytes = changes.pop("shared_bytes", good.shared_bytes)
    reports = (good.ptxas, good.instructions)
    return Compiled(
        *(replace(x, **{k: v for k, v in changes.items() if hasattr(x, k)}) for x in reports),
        shared_bytes,
        good.loops,
    )


def test_a_good_kernel_has_no_fault() -> None:
    assert faults(TANGENT, GOOD) == []
    assert faults(HOPPER, GOOD_HOPPER) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_stores": 4}, "4 bytes of spill stores"),
        ({"spill_loads": 8}, "8 bytes of spill loads"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"local": 3}, "3 instructions LDL and STL, which use local memory"),
        ({"hmma": 0}, "no instruction HMMA: the tensor cores are not used"),
        ({"ldgsts": 0}, "no instruction LDGSTS: no copy is asynchronous"),
        ({"warnings": ("slow",)}, "ptxas warns: slow"),
        (
            {"shared_bytes": MAX_SHARED_BYTES["sm80"] + 1},
            "101377 bytes of shared memory, a block can have 101376",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_regression_is_a_fault(changes: dict[str, object], fault: str) -> None:
    assert faults(TANGENT, regressed(**changes)) == [f"{TANGENT.name}: {fault}"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hgmma": 0}, "no instruction HGMMA: the tensor cores are not used by warpgroups"),
        ({"utmaldg": 0}, "no instruction UTMALDG: the TMA is not used"),
        (
            {"usetmaxreg": 0},
            "no instruction USETMAXREG: warpgroups do not reallocate registers",
        ),
        (
            {"shared_bytes": MAX_SHARED_BYTES["sm90"] + 1},
            "232449 bytes of shared memory, a block can have 232448",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_regression_of_a_hopper_kernel_is_a_fault(
    changes: dict[str, object], fault: str
) -> None:
    assert faults(HOPPER, regressed(GOOD_HOPPER, **changes)) == [f"{HOPPER.name}: {fault}"]


def test_a_block_may_use_all_of_its_shared_memory() -> None:
    assert faults(TANGENT, regressed(shared_bytes=MAX_SHARED_BYTES["sm80"])) == []
    assert faults(HOPPER, regressed(GOOD_HOPPER, shared_bytes=MAX_SHARED_BYTES["sm90"])) == []


def test_faults_of_loops_name_the_kernel() -> None:
    kernel = replace(GOOD_HOPPER, loops=replace(LOOPS, hazards=("a hazard",)))
    assert faults(HOPPER, kernel) == [f"{HOPPER.name}: a hazard"]
    (fault,) = all_faults({HOPPER.name: replace(kernel, loops=LOOPS)}, {HOPPER.name: 90})
    assert fault.startswith(f"{HOPPER.name}: an iteration takes 100 instructions")


def test_the_preprocess_kernel_multiplies_no_matrices() -> None:
    assert faults(PREPROCESS, regressed(hmma=0, ldgsts=0)) == []


def test_table_and_json_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETUP.__dict__, "find_toolkit", lambda: SETUP.Toolkit(Path(), "13.0.88"))
    compiled = {
        TANGENT.name: GOOD,
        PREPROCESS.name: regressed(registers=40),
        HOPPER.name: GOOD_HOPPER,
    }
    first, *lines = as_table(compiled).splitlines()
    head = first.split()
    written = json.loads(as_json(compiled, "sm_80"))
    assert (written["arch"], written["nvcc"]) == ("sm_80", "13.0.88")
    assert written["kernels"] == {
        name: dict(zip(head[1:], map(json.loads, numbers), strict=True))
        for name, *numbers in (x.replace(" -", " null").split() for x in lines)
    }
    assert written["kernels"][TANGENT.name]["shared_bytes"] == 65536
    assert written["kernels"][HOPPER.name]["loop_instructions"] == 100
    assert written["kernels"][HOPPER.name]["busy_percent"] == 98
    assert written["kernels"][PREPROCESS.name]["busy_percent"] is None


def test_the_phases_of_each_loop_are_printed() -> None:
    compiled = {TANGENT.name: GOOD, HOPPER.name: GOOD_HOPPER}
    assert as_phases(compiled).splitlines() == [
        *(f"{HOPPER.name}, the loop at 0x3000:", "4 x HGMMA", "a wait"),
    ]


def test_loops_are_compared_with_the_report_of_the_same_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = tmp_path / "kernel-registers-sm_90a.json"
    monkeypatch.setitem(SETUP.__dict__, "find_toolkit", lambda: SETUP.Toolkit(Path(), "13.0.88"))
    assert recorded_instructions("sm_90a", report) == {}
    compiled = {HOPPER.name: GOOD_HOPPER, TANGENT.name: GOOD}
    report.write_text(as_json(compiled, "sm_90a"))
    assert recorded_instructions("sm_90a", report) == {HOPPER.name: 100, TANGENT.name: 0}
    monkeypatch.setitem(SETUP.__dict__, "find_toolkit", lambda: SETUP.Toolkit(Path(), "13.1.0"))
    assert recorded_instructions("sm_90a", report) == {}


# ----------------------------------------------------------------------------
# Reading the build


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_has_a_fault(arch: str) -> None:
    try:
        compiled = read_build(KERNELS.values(), arch)
    except NotBuilt as error:  # the build is for the GPU that is present
        print(error)
        compiled = compile_all(KERNELS.values(), arch)
    print(as_table(compiled))
    assert all_faults(compiled, recorded_instructions(arch)) == []


@needs_nvcc
def test_a_kernel_that_was_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match=r"forward_jvp_bf16_d128\.o or its log is missing"):
        read_built(tmp_path, {}, TANGENT, tmp_path, "sm_80")


@needs_nvcc
@pytest.mark.slow
def test_the_build_and_the_gate_compile_the_same_code() -> None:
    """Otherwise the registers that --out writes without --built would not be the build's."""
    entries = [KERNELS["forward_bf16_d64"]]
    try:
        built = read_build(entries, "sm_80")
    except NotBuilt as error:
        pytest.skip(str(error))
    alone = compile_all(entries, "sm_80")
    assert {k: row(x) for k, x in built.items()} == {k: row(x) for k, x in alone.items()}


# ----------------------------------------------------------------------------
# Compiling


def oversized(entry: KernelEntry, keys: int) -> KernelEntry:
    """A kernel with another number of keys in its tile."""
    assert entry.tile is not None
    tile, larger = f"{entry.tile[0]}, {entry.tile[1]}", f"{entry.tile[0]}, {keys}"
    assert tile in entry.cpp_class
    return replace(entry, cpp_class=entry.cpp_class.replace(tile, larger))


@needs_nvcc
@pytest.mark.slow
def test_a_tile_too_large_for_the_registers_is_a_fault() -> None:
    entry = oversized(TANGENT, 128)
    found = faults(entry, compile_all([entry], "sm_80")[entry.name])
    assert any("bytes of spill stores" in fault for fault in found)
    assert any("instructions LDL and STL" in fault for fault in found)
    assert any("bytes of shared memory, a block can have" in fault for fault in found)


@needs_nvcc
@pytest.mark.slow
def test_serialized_wgmma_is_a_fault() -> None:
    entry = oversized(HOPPER, 128)
    found = faults(entry, compile_all([entry], "sm_90a")[entry.name])
    assert any("wgmma.mma_async instructions are serialized" in fault for fault in found)


@needs_nvcc
def test_hopper_kernels_are_not_compiled_for_sm_80() -> None:
    assert compile_all([HOPPER], "sm_80") == {}


@needs_nvcc
@pytest.mark.slow
def test_the_script_writes_json_and_rejects_unknown_names(tmp_path: Path) -> None:
    def gate(*options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", GATE, "--kernels", "preprocess_bf16", *options]
        return subprocess.run([str(x) for x in command], capture_output=True, text=True)

    good = gate("--out", tmp_path)
    assert good.returncode == 0, good.stderr
    written = json.loads((tmp_path / "kernel-registers-sm_80.json").read_text())
    assert list(written["kernels"]) == ["preprocess_bf16"]
    assert "preprocess_bf16" in good.stdout

    none = gate("--kernels", "backwards*")
    assert none.returncode == 1 and "no kernel is called backwards*" in none.stderr
