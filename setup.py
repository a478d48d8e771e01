"""Builds the CUDA extension `jvp_attn._C` where nvcc is found, else a pure-Python package.

`JVP_ATTN_CUDA=1` turns "else" into an error, `JVP_ATTN_CUDA=0` skips the extension.
`TORCH_CUDA_ARCH_LIST` and `MAX_JOBS` work as for PyTorch's own extensions.
All else about the package is in pyproject.toml.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

# torch brings BuildExtension and the headers of pybind11; with ninja, files compile in parallel.
BUILD_REQUIREMENTS = ["torch>=2.11", "ninja"]

# A build frontend runs these to collect requirements, metadata and sources: they compile nothing.
PREPARATIONS = {"egg_info", "dist_info", "sdist"}

SOURCES = {".cpp", ".cu"}

# Where the sources of the kernels go that csrc/generate.py writes.
GENERATED = Path("build/kernels")

LICENSE = "Apache-2.0"

DEFAULT_ARCH_LIST = "8.0 9.0+PTX"


@dataclass(frozen=True)
class Toolkit:
    """Where a CUDA toolkit lives, and the version of its nvcc, such as "13.0.88"."""

    root: Path
    version: str


def main() -> None:
    choice = os.environ.get("JVP_ATTN_CUDA") or "automatic"
    if choice not in {"0", "1", "automatic"}:
        fail(f"JVP_ATTN_CUDA is {choice!r}; it can be 0, 1 or unset.")
    toolkit = None if choice == "0" else find_toolkit()

    if PREPARATIONS.intersection(sys.argv):
        setup(license=LICENSE, setup_requires=BUILD_REQUIREMENTS if toolkit else [])
        return

    if choice == "0":
        obstacle = "JVP_ATTN_CUDA=0"
    elif toolkit is None:
        obstacle = "no nvcc in CUDA_HOME, CUDA_PATH or PATH"
    else:
        obstacle = why_no_torch()

    if toolkit and not obstacle:
        setup(
            license=LICENSE,
            ext_modules=[cuda_extension(toolkit)],
            cmdclass={"build_ext": build_command(toolkit)},
        )
    elif choice == "1":
        fail(f"JVP_ATTN_CUDA=1 asks for the CUDA extension, but it cannot be built: {obstacle}.")
    else:
        notice(f"{obstacle}: the CUDA extension is left out.")
        setup(license=LICENSE)


def notice(text: str) -> None:
    print(f"jvp-attn: {text}", file=sys.stderr)


def fail(text: str) -> NoReturn:
    sys.exit(f"jvp-attn: {text}")


def find_toolkit() -> Toolkit | None:
    """Find the toolkit of the nvcc in CUDA_HOME, CUDA_PATH or PATH, in this order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [os.path.join(home, "bin") for home in homes] + [os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return None

    # This nvcc may be a link or a wrapper, far from its toolkit. Only nvcc itself knows its home.
    plan = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)
    root = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    if not (root and version):
        fail(f"{nvcc} does not run as nvcc should. JVP_ATTN_CUDA=0 installs without it.")
    return Toolkit(Path(root[1].strip()).resolve(), version[1])


def output_of(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout


def why_no_torch() -> str | None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None


def cuda_extension(toolkit: Toolkit) -> Extension:
    """Describe `jvp_attn._C`: no header of torch but its pybind11, no library of torch at all.

    So it builds beside a CPU-only torch, and its own CUDA runtime, linked in, need not be torch's.
    """
    import torch

    targets = code_targets(arch_list())
    definitions = {
        "JVP_ATTN_ARCHS": " ".join(targets),
        "JVP_ATTN_NVCC_VERSION": toolkit.version,
        "JVP_ATTN_GIT_HASH": git_hash(),
    }
    return Extension(
        "jvp_attn._C",
        sources=[str(path) for path in sources(targets)],
        include_dirs=[str(Path("csrc").resolve())],
        library_dirs=[str(toolkit.root / folder) for folder in ("lib64", "lib")],
        libraries=["cudart_static", "dl", "pthread", "rt"],
        # torch may load another CUDA runtime into the same process: keep this one's names private.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        extra_compile_args={
            "cxx": [
                *("-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"),
                *("-isystem", str(Path(torch.__file__).parent / "include")),
                *(f'-D{name}="{value}"' for name, value in definitions.items()),
            ],
            "nvcc": [
                *("-std=c++17", "-O3", "-Xcompiler", "-Wall,-Wextra,-fvisibility=hidden"),
                *(f"-gencode=arch={t.replace('sm', 'compute')},code={t}" for t in targets),
                # BuildExtension switches these off because torch has half types of its own.
                "-U__CUDA_NO_HALF_OPERATORS__",
                "-U__CUDA_NO_HALF_CONVERSIONS__",
                "-U__CUDA_NO_HALF2_OPERATORS__",
                "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
            ],
        },
    )


def sources(targets: list[str]) -> list[Path]:
    """Find the sources in csrc/ and generate those of the kernels, which take longer: last."""
    written = sorted(path for path in Path("csrc").rglob("*") if path.suffix in SOURCES)
    generator = runpy.run_path("csrc/generate.py")
    # Those for compute capability 9.0 alone are empty in code for another.
    archs = {"sm80", "sm90"} if "sm_90a" in targets else {"sm80"}
    kernels = [kernel for kernel in generator["kernel_table"]() if kernel.arch in archs]
    return [*written, *generator["generate"](GENERATED, kernels)]


def arch_list() -> str:
    """List the GPUs to compile for, as TORCH_CUDA_ARCH_LIST does: "8.0 9.0+PTX"."""
    import torch

    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    ordinals = range(torch.cuda.device_count())
    present = {"{}.{}".format(*torch.cuda.get_device_capability(ordinal)) for ordinal in ordinals}
    return " ".join(sorted(present)) or DEFAULT_ARCH_LIST


def code_targets(arch_list: str) -> list[str]:
    """Turn "8.0 9.0+PTX" into nvcc's words: sm_80 is machine code, compute_90 is PTX."""
    targets = []
    for arch in arch_list.replace(";", " ").split():
        if not (match := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)):
            fail(f'cannot read {arch!r} in TORCH_CUDA_ARCH_LIST; write it as in "8.0;9.0+PTX".')
        major, minor, variant, ptx = match.groups()
        if int(major) < 8:
            notice(f"skipping architecture {arch}: the kernels need compute capability 8.0.")
            continue
        # wgmma exists in sm_90a alone, which every GPU of capability 9.0 can run.
        targets.append(f"sm_{major}{minor}" + ("a" if major == "9" else variant))
        # PTX is there for newer GPUs, and the PTX of a variant would not run on them.
        if ptx:
            targets.append(f"compute_{major}{minor}")
    if not targets:
        fail("no architecture is left to compile for; see TORCH_CUDA_ARCH_LIST.")
    return targets


def git_hash() -> str:
    """Name the commit in this folder, with "-dirty" if files differ; "unknown" in an sdist."""
    # Without --git-dir, an sdist unpacked inside another project would tell that project's commit.
    git = ["git", "--git-dir=.git", "--work-tree=."]
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def build_command(toolkit: Toolkit) -> type:
    """Return torch's build_ext, taught where nvcc is and to end with a message one can act on."""
    import torch
    from torch.utils import cpp_extension

    # A CPU-only torch knows neither. Without the version, ninja would miss changes in headers.
    cpp_extension.CUDA_HOME = str(toolkit.root)
    torch.version.cuda = ".".join(toolkit.version.split(".")[:2])

    class BuildCuda(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                fail(
                    f"the CUDA extension did not compile: {error}\n"
                    f"The compiler's own words are above; nvcc {toolkit.version} was called in "
                    f"{toolkit.root}.\n"
                    "JVP_ATTN_CUDA=0 installs without the extension, CUDA_HOME chooses another "
                    "toolkit,\nTORCH_CUDA_ARCH_LIST other GPUs."
                )

    return BuildCuda


if __name__ == "__main__":
    main()
