"""Builds the extensions: `jvp_attn._cpu` with a C++ compiler, `jvp_attn._C` with nvcc.

What cannot be built is left out, and the package works without. `JVP_ATTN_CPU=1` and
`JVP_ATTN_CUDA=1` make that an error, `JVP_ATTN_CPU=0` and `JVP_ATTN_CUDA=0` leave one out.
`CXX`, `TORCH_CUDA_ARCH_LIST` and `MAX_JOBS` work as for PyTorch's own extensions.
All else about the package is in pyproject.toml.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# torch brings BuildExtension; with ninja, files compile in parallel.
CUDA_REQUIREMENTS = ["torch>=2.11", "ninja"]

# A build frontend runs these to collect requirements, metadata and sources: they compile nothing.
PREPARATIONS = {"egg_info", "dist_info", "sdist"}

SOURCES = {".cpp", ".cu"}

# Products may become fused multiply-adds. What passes vectors by value is inlined, so that nothing
# depends on how the ABI does that.
CPU_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra"]
CPU_FLAGS += ["-Wno-psabi", "-fvisibility=hidden"]

# What a compiler must understand.
PROBE = """
#include <atomic>
typedef float Vector __attribute__((vector_size(16)));
void publish(std::atomic<int>& x, Vector& y) { x.notify_all(); y = y > y ? y : y + y; }
"""

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
    toolkit = None if wish_for("JVP_ATTN_CUDA") == "0" else find_toolkit()
    if PREPARATIONS.intersection(sys.argv):
        setup(license=LICENSE, setup_requires=CUDA_REQUIREMENTS if toolkit else [])
        return

    extensions, command = [], build_ext
    if is_wanted("CPU", why_no_compiler() or why_no_pybind11()):
        extensions.append(cpu_extension())
    if is_wanted("CUDA", why_no_torch() if toolkit else "no nvcc in CUDA_HOME, CUDA_PATH or PATH"):
        extensions.append(cuda_extension(toolkit))
        command = cuda_build_command(toolkit)
    setup(
        license=LICENSE,
        ext_modules=extensions,
        cmdclass={"build_ext": ending_with_advice(command)},
    )


def wish_for(variable: str) -> str:
    wish = os.environ.get(variable) or "automatic"
    if wish not in {"0", "1", "automatic"}:
        fail(f"{variable} is {wish!r}; it can be 0, 1 or unset.")
    return wish


def is_wanted(name: str, obstacle: str | None) -> bool:
    """Whether to build an extension; says why not, and ends where it must be built and cannot."""
    variable = f"JVP_ATTN_{name}"
    wish = wish_for(variable)
    if wish == "0":
        obstacle = f"{variable}=0"
    elif wish == "1" and obstacle:
        fail(f"{variable}=1 asks for the {name} extension, but it cannot be built: {obstacle}.")
    if obstacle:
        notice(f"{obstacle}: the {name} extension is left out.")
    return not obstacle


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


def why_no_compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    with tempfile.TemporaryDirectory() as folder:
        probe, result = Path(folder, "probe.cpp"), Path(folder, "probe.o")
        probe.write_text(PROBE)
        try:
            output_of(*command, *CPU_FLAGS, "-c", str(probe), "-o", str(result))
        except OSError as error:
            return f"no C++ compiler ({error})"
        if not result.exists():
            return f"{command[0]} does not compile C++20 with GCC's vector extensions"
    return None


def why_no_pybind11() -> str | None:
    return None if pybind11_headers() else "there is neither pybind11 nor torch, which has it too"


def pybind11_headers() -> str | None:
    for package in ("pybind11", "torch"):
        if spec := importlib.util.find_spec(package):
            return str(Path(spec.origin).parent / "include")
    return None


def cpu_extension() -> Extension:
    """Describe `jvp_attn._cpu`, which knows nothing of torch."""
    folder = Path("csrc/cpu")
    return Extension(
        "jvp_attn._cpu",
        sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
        depends=["setup.py", "csrc/common/bindings.h", *map(str, sorted(folder.glob("*.h")))],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=[*CPU_FLAGS, "-isystem", pybind11_headers()],
        extra_link_args=["-pthread", "-ldl"],
        language="c++",
    )


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
    written = sorted(path for path in Path("csrc").glob("*") if path.suffix in SOURCES)
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


def cuda_build_command(toolkit: Toolkit) -> type[build_ext]:
    """Return torch's build_ext, taught where nvcc is."""
    import torch
    from torch.utils import cpp_extension

    # A CPU-only torch knows neither. Without the version, ninja would miss changes in headers.
    cpp_extension.CUDA_HOME = str(toolkit.root)
    torch.version.cuda = ".".join(toolkit.version.split(".")[:2])
    return cpp_extension.BuildExtension


def ending_with_advice(command: type[build_ext]) -> type[build_ext]:
    """Teach build_ext to end with a message one can act on."""

    class Build(command):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                names = " or ".join(extension.name for extension in self.extensions)
                fail(
                    f"{names} did not compile: {error}\nThe compiler's own words are above.\n"
                    "JVP_ATTN_CPU=0 and JVP_ATTN_CUDA=0 install without an extension, CXX chooses "
                    "another C++\ncompiler, CUDA_HOME another toolkit, TORCH_CUDA_ARCH_LIST other "
                    "GPUs."
                )

    return Build


if __name__ == "__main__":
    main()
