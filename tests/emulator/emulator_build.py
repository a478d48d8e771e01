"""Builds the emulator with g++: `python -m tests.emulator.emulator_build [--sanitize]`.

The result is a Python module in build/emulator, with the kernels of the kernel table. Only changed
files are compiled. The environment variables CXX and MAX_JOBS are respected.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "emulator"

MODULE_SOURCE = HERE / "module.cpp"  # differs from module to module
MACHINE_SOURCES = sorted(set(HERE.glob("*.cpp")) - {MODULE_SOURCE})


@dataclass(frozen=True)
class Variant:
    """Compiler flags, and the folder of their build."""

    name: str
    flags: tuple[str, ...] = ()


PLAIN = Variant("plain")
SANITIZED = Variant(
    "sanitized",
    (
        *("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"),
        # wgmma_fence reads all registers that wgmmas have used, in scope or not.
        "-fno-sanitize-address-use-after-scope",
    ),
)
# Switches fibers by ucontext, as on processors without a switch in assembly.
PORTABLE = Variant("portable", ("-DJVP_ATTN_UCONTEXT",))

FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # fuses only what the kernels fuse by fmaf
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # nvcc's #pragma unroll
    "-Wno-psabi",  # about passing tensor maps, which are aligned to 64 bytes
    "-DJVP_ATTN_EMULATOR",
    f"-fmacro-prefix-map={ROOT}/=",  # so that reports name files relative to the repository
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
    f"-isystem {pybind11.get_include()}",
    f"-isystem {sysconfig.get_path('include')}",
)

RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -x $language -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $flags -shared @$out.rsp -o $out
  rspfile = $out.rsp
  rspfile_content = $in
rule archive
  command = rm -f $out && ar rcs $out $in
"""


def build_kernels(
    variant: Variant = PLAIN, wanted: Callable[[str], bool] = lambda name: True
) -> Path:
    """Bring the module `attention_emulator` up to date.

    Args:
        variant: how to compile it.
        wanted: whether the module contains a kernel, by its name in the kernel table.

    Returns:
        The module's file.

    Raises:
        RuntimeError: the compilation fails; with the compiler's output.
    """
    folder = OUTPUT / variant.name / "sources"
    with _locked(folder):
        generator: dict[str, Any] = run_path(str(ROOT / "csrc" / "generate.py"))
        kernels = [kernel for kernel in generator["kernel_table"]() if wanted(kernel.name)]
        sources = generator["generate"](folder, kernels)
        return build_module("attention_emulator", sources, variant)


def build_module(name: str, sources: Iterable[Path], variant: Variant = PLAIN) -> Path:
    """Bring a module with other kernels up to date.

    Args:
        name: of the module, and of its folder.
        sources: of the kernels; one of them defines `all_kernels` of csrc/kernel.h.
        variant: how to compile it.

    Returns, Raises: as `build_kernels`.
    """
    machine = _build_machine(variant)
    folder = OUTPUT / variant.name / name
    file = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _locked(folder):
        _write_module_manifest(folder, [MODULE_SOURCE, *sources], variant, machine, file)
        _run_ninja(folder)
    return file


def _build_machine(variant: Variant) -> Path:
    """Bring the library up to date that all modules are linked with."""
    folder = OUTPUT / variant.name / "machine"
    file = folder / "libmachine.a"
    objects = [f"{source.stem}.o" for source in MACHINE_SOURCES]
    with _locked(folder):
        _write_manifest(
            folder,
            variant,
            *(f"build {source.stem}.o: compile {source}" for source in MACHINE_SOURCES),
            f"build {file.name}: archive {' '.join(objects)}",
        )
        _run_ninja(folder)
    return file


def _write_module_manifest(
    folder: Path, sources: list[Path], variant: Variant, machine: Path, file: Path
) -> None:
    objects = [f"{source.stem}.o" for source in sources]
    name = folder.name
    _write_manifest(
        folder,
        Variant(variant.name, (*variant.flags, f"-DJVP_ATTN_MODULE={name}")),
        # A precompiled header halves the compile time of the kernels.
        f"build launch.cuh.gch: compile {ROOT / 'csrc' / 'sm80' / 'launch.cuh'}",
        "  language = c++-header",
        *(f"build {source.stem}.o: compile {source} | launch.cuh.gch" for source in sources),
        f"build {file.name}: link {' '.join(objects)} {machine}",
    )


def _write_manifest(folder: Path, variant: Variant, *statements: str) -> None:
    (folder / "build.ninja").write_text(
        "\n".join(
            [
                f"cxx = {os.environ.get('CXX', 'g++')}",
                f"flags = {' '.join(('-I.', *FLAGS, *variant.flags))}",
                "language = c++",
                RULES,
                *statements,
                "",
            ]
        )
    )


def _run_ninja(folder: Path) -> None:
    command = [str(Path(ninja.BIN_DIR) / "ninja")]
    if "MAX_JOBS" in os.environ:
        command += ["-j", os.environ["MAX_JOBS"]]
    result = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        raise RuntimeError(f"the emulator does not build\n{result.stdout}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer")
    print(build_kernels(SANITIZED if parser.parse_args().sanitize else PLAIN))
