"""Every kernel compiles to what the table promises, and the gate sees where one does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jvp_attn.backends import kernel_table
from jvp_attn.backends.kernel_table import KERNELS, KernelEntry
from tests.compile_gate.compile_gate import (
    MAX_SHARED_BYTES,
    SETUP,
    Compiled,
    all_faults,
    as_json,
    as_table,
    compile_all,
    faults,
)
from tests.compile_gate.compiler_report import Instructions, PtxasReport

GATE = Path(__file__).with_name("compile_gate.py")

needs_nvcc = pytest.mark.skipif(SETUP.find_toolkit() is None, reason="nvcc is not installed")

TANGENT = KERNELS["forward_jvp_bf16_d128"]
HOPPER = KERNELS["forward_jvp_bf16_d128_sm90"]
PREPROCESS = KERNELS["preprocess_bf16"]
REGISTERS = PtxasReport(250, 0, 0, 0, 65537, ())
GOOD = Compiled(REGISTERS, Instructions(7800, hmma=256, ldgsts=40, mufu=32))
GOOD_HOPPER = Compiled(REGISTERS, Instructions(4700, hgmma=55, utmaldg=16, usetmaxreg=2, mufu=60))


# ----------------------------------------------------------------------------
# Judging


def regressed(good: Compiled = GOOD, **changes: object) -> Compiled:
    """The same but for these numbers."""
    reports = (good.ptxas, good.instructions)
    return Compiled(
        *(replace(x, **{k: v for k, v in changes.items() if hasattr(x, k)}) for x in reports)
    )


def test_a_good_kernel_has_no_fault() -> None:
    assert faults(TANGENT, GOOD) == []
    assert faults(HOPPER, GOOD_HOPPER) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_stores": 4}, "4 bytes of spill stores, 0 are allowed"),
        ({"spill_loads": 8}, "8 bytes of spill loads, 0 are allowed"),
        ({"stack": 16}, "16 bytes of stack, 0 are allowed"),
        ({"local": 3}, "3 instructions LDL and STL, which use local memory"),
        ({"hmma": 0}, "no instruction HMMA: the tensor cores are not used"),
        ({"ldgsts": 0}, "no instruction LDGSTS: no copy is asynchronous"),
        ({"warnings": ("slow",)}, "ptxas warns: slow"),
        (
            {"global_bytes": MAX_SHARED_BYTES["sm80"] + 2},
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
            "no instruction USETMAXREG: warpgroups do not share registers as they need them",
        ),
        (
            {"global_bytes": MAX_SHARED_BYTES["sm90"] + 2},
            "232449 bytes of shared memory, a block can have 232448",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_regression_of_a_hopper_kernel_is_a_fault(
    changes: dict[str, object], fault: str
) -> None:
    assert faults(HOPPER, regressed(GOOD_HOPPER, **changes)) == [f"{HOPPER.name}: {fault}"]


def test_all_the_shared_memory_that_a_block_can_have_is_no_fault() -> None:
    assert faults(TANGENT, regressed(global_bytes=MAX_SHARED_BYTES["sm80"] + 1)) == []
    all_of_it = regressed(GOOD_HOPPER, global_bytes=MAX_SHARED_BYTES["sm90"] + 1)
    assert faults(HOPPER, all_of_it) == []


def test_the_preprocess_kernel_multiplies_no_matrices() -> None:
    assert faults(PREPROCESS, regressed(hmma=0, ldgsts=0)) == []


def test_the_table_can_allow_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = regressed(spill_stores=12, spill_loads=16, stack=8, local=7)
    monkeypatch.setitem(kernel_table.ALLOWED_SPILL_BYTES, TANGENT.name, 16)
    assert faults(TANGENT, spilling) == []
    monkeypatch.setitem(kernel_table.ALLOWED_SPILL_BYTES, TANGENT.name, 15)
    assert faults(TANGENT, spilling) == [f"{TANGENT.name}: 16 bytes of spill loads, 15 are allowed"]


def test_table_and_json_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETUP.__dict__, "find_toolkit", lambda: SETUP.Toolkit(Path(), "13.0.88"))
    compiled = {TANGENT.name: GOOD, PREPROCESS.name: regressed(registers=40)}
    head, *lines = (line.split() for line in as_table(compiled).splitlines())
    told = json.loads(as_json(compiled, "sm_80"))
    assert (told["arch"], told["nvcc"]) == ("sm_80", "13.0.88")
    assert told["kernels"] == {
        name: dict(zip(head[1:], map(int, numbers), strict=True)) for name, *numbers in lines
    }
    assert told["kernels"][TANGENT.name]["shared_bytes"] == 65536


# ----------------------------------------------------------------------------
# Compiling


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_kernel_compiles_to_what_the_table_promises(arch: str) -> None:
    compiled = compile_all(KERNELS.values(), arch)
    print(as_table(compiled))
    assert all_faults(compiled) == []


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
    assert any("bytes of spill stores, 0 are allowed" in fault for fault in found)
    assert any("instructions LDL and STL" in fault for fault in found)
    assert any("bytes of shared memory, a block can have" in fault for fault in found)


@needs_nvcc
@pytest.mark.slow
def test_products_of_warpgroups_that_wait_for_each_other_are_a_fault() -> None:
    entry = oversized(HOPPER, 128)
    found = faults(entry, compile_all([entry], "sm_90a")[entry.name])
    assert any("wgmma.mma_async instructions are serialized" in fault for fault in found)


@needs_nvcc
def test_kernels_for_one_gpu_are_compiled_for_no_other() -> None:
    assert compile_all([HOPPER], "sm_80") == {}


@needs_nvcc
@pytest.mark.slow
def test_the_script_ends_with_1_where_there_is_a_fault(tmp_path: Path) -> None:
    def gate(*options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, GATE, "--kernels", "preprocess_bf16", *options]
        return subprocess.run([str(x) for x in command], capture_output=True, text=True)

    good = gate("--out", tmp_path)
    assert good.returncode == 0, good.stderr
    written = json.loads((tmp_path / "kernel-registers-sm_80.json").read_text())
    assert list(written["kernels"]) == ["preprocess_bf16"]
    assert "preprocess_bf16" in good.stdout

    none = gate("--kernels", "backwards*")
    assert none.returncode == 1 and "no kernel is called backwards*" in none.stderr
