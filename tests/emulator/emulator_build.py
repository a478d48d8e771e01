"""Builds the emulator with g++ alone: `python tests/emulator/emulator_build.py [--sanitize]`.

Out comes a Python module, in build/emulator, with the kernels of the kernel table. Only what
changed is compiled. CXX and MAX_JOBS are honoured.
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
    """A way to compile everything, in a folder of its own."""

    name: str
    flags: tuple[str, ...] = ()


PLAIN = Variant("plain")
SANITIZED = Variant(
    "sanitized",
    (
        *("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"),
        # wgmma_fence looks at all registers that products have used, in scope or not.
        "-fno-sanitize-address-use-after-scope",
    ),
)
# Switches between fibers as on machines for which there is no switch in assembly.
PORTABLE = Variant("portable", ("-DJVP_ATTN_UCONTEXT",))

FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # nvcc's #pragma unroll
    "-Wno-psabi",  # tensor maps are aligned to 64 bytes, which GCC 4.5 could not pass
    "-DJVP_ATTN_EMULATOR",
    f"-fmacro-prefix-map={ROOT}/=",  # reports name files from the root of the repository on
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
        wanted: says of the name of a kernel in the kernel table whether the module shall have it.

    Returns:
        The module's file.

    Raises:
        RuntimeError: something does not compile; with the compiler's output.
    """
    folder = OUTPUT / variant.name / "sources"
    with _alone_in(folder):
        generator: dict[str, Any] = run_path(str(ROOT / "csrc" / "generate.py"))
        kernels = [kernel for kernel in generator["kernel_table"]() if wanted(kernel.name)]
        sources = generator["generate"](folder, kernels)
        return build_module("attention_emulator", sources, variant)


def build_module(name: str, sources: Iterable[Path], variant: Variant = PLAIN) -> Path:
    """Bring a module with kernels of one's own up to date.

    Args:
        name: of the module, and of its folder.
        sources: of the kernels; one of them defines `all_kernels` of csrc/kernel.h.
        variant: how to compile it.

    Returns, Raises: as `build_kernels`.
    """
    machine = _build_machine(variant)
    folder = OUTPUT / variant.name / name
    file = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _alone_in(folder):
        _write_module_manifest(folder, [MODULE_SOURCE, *sources], variant, machine, file)
        _run_ninja(folder)
    return file


def _build_machine(variant: Variant) -> Path:
    """Bring up to date what all modules are linked with."""
    folder = OUTPUT / variant.name / "machine"
    file = folder / "libmachine.a"
    objects = [f"{source.stem}.o" for source in MACHINE_SOURCES]
    with _alone_in(folder):
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
        # Precompiled, what all kernels include first takes half as long.
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
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time build there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer")
    print(build_kernels(SANITIZED if parser.parse_args().sanitize else PLAIN))
