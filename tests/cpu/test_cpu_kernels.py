"""C++ tests of the CPU kernels, without torch: under sanitizers, per instruction set, on Arm."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cpu"
CXX = shlex.split(os.environ.get("CXX") or "g++")
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += [f"-I{KERNELS.parent}"]
SANITIZERS = {  # compiler flags, and arguments of the test
    "addresses and undefined behaviour": (["-O1", "-fsanitize=address,undefined"], []),
    "threads": (["-O2", "-fsanitize=thread"], ["races"]),
}
IS_X86 = platform.machine() == "x86_64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(CXX[0]), reason="there is no C++ compiler"),
]


def run(*command: object) -> str:
    result = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def compile_all(
    sources: Iterable[Path], folder: Path, compiler: list[str], *flags: str
) -> list[Path]:
    """Compile the sources in parallel; warnings are errors."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        output = run(*compiler, *FLAGS, *flags, "-c", source, "-o", target)
        assert "warning" not in output, output
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def kernels_and_test() -> list[Path]:
    shared = [KERNELS / "dispatch.cpp", KERNELS / "threads.cpp"]
    return [*KERNELS.glob("isa_*.cpp"), *shared, HERE / "attention.cpp"]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_of_every_instruction_set_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    flags, arguments = SANITIZERS[sanitizer]
    flags = ["-g", *flags, "-fno-sanitize-recover=all"]
    objects = compile_all(kernels_and_test(), tmp_path, CXX, *flags)
    run(*CXX, *FLAGS, *flags, *objects, "-o", tmp_path / "attention")
    assert "baseline" in run(tmp_path / "attention", *arguments)


# ----------------------------------------------------------------------------
# Numerics

INSTRUCTION_SETS = {
    "avx512": (64, ["avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"]),
    "avx2": (32, ["avx2", "fma"]),
    "baseline": (16, []),
}


def is_supported(features: list[str]) -> bool:
    if not features:
        return True
    return IS_X86 and set(features) <= set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_exp_is_accurate_to_2_ulp_and_half_precision_is_exact(name: str, tmp_path: Path) -> None:
    width, features = INSTRUCTION_SETS[name]
    if not is_supported(features):
        pytest.skip("this machine lacks the instruction set")
    flags = [f"-DJVP_ATTN_ISA={name}", f"-DJVP_ATTN_VECTOR_BYTES={width}", "-O2"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all", *(f"-m{x}" for x in features)]
    objects = compile_all([HERE / "numerics.cpp"], tmp_path, CXX, *flags)
    run(*CXX, *FLAGS, *flags, *objects, "-o", tmp_path / "numerics")
    assert run(tmp_path / "numerics").count("ulp") == 2


# ----------------------------------------------------------------------------
# Instruction sets


@pytest.mark.skipif(not IS_X86, reason="only x86-64 has several instruction sets")
@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_functions_that_the_linker_may_share_are_compiled_for_every_machine(
    name: str, tmp_path: Path
) -> None:
    """The linker keeps one of several equal functions; machines without the set may run it."""
    [file] = compile_all([KERNELS / f"isa_{name}.cpp"], tmp_path, CXX, "-O3", "-fPIC")
    symbols = [line.split() for line in run("nm", file).splitlines()]
    weak = {symbol for *_, kind, symbol in symbols if kind in "WVu"}
    own = {symbol for symbol in weak if f"{len(name)}{name}" in symbol}
    assert own < weak
    for function in run("objdump", "-d", "--no-show-raw-insn", file).split("\n\n"):
        title = re.match(r"[0-9a-f]+ <(.*)>:", function)
        if title and title[1] in weak - own:
            assert not re.search(r"\tv[a-z]|[yz]mm", function), title[1]


CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"there is no {CROSS_COMPILER} or no {EMULATOR}",
)
def test_kernels_and_numerics_on_arm(tmp_path: Path) -> None:
    flags = ["-O2", "-static", "-DJVP_ATTN_ISA=baseline", "-DJVP_ATTN_VECTOR_BYTES=16"]
    [numerics] = compile_all([HERE / "numerics.cpp"], tmp_path, [CROSS_COMPILER], *flags)
    kernels = compile_all(kernels_and_test(), tmp_path, [CROSS_COMPILER], *flags[:2])
    for name, objects in (("numerics", [numerics]), ("attention", kernels)):
        run(CROSS_COMPILER, *FLAGS, *flags, *objects, "-o", tmp_path / name)
        run(EMULATOR, tmp_path / name)
